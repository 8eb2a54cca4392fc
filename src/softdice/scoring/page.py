"""The frame of the HTML report: style and the script that sorts tables. Doubled braces are braces (str.format)."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ --ink: #1a1f26; --faint: #667080; --line: #dfe3e8; --back: #ffffff; --soft: #f4f6f8; --mark: #1f6feb; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6eaf0; --faint: #98a2b0; --line: #333b45; --back: #14181d; --soft: #1c2229; --mark: #6cabff; }}
}}
body {{ margin: 0 auto; max-width: 1100px; padding: 24px; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 22px; overflow-wrap: anywhere; }}
h2 {{ font-size: 18px; margin: 40px 0 12px; overflow-wrap: anywhere; }}
h3 {{ font-size: 15px; margin: 24px 0 8px; }}
.numbers {{ display: grid; gap: 12px; margin: 12px 0 20px;
  grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); }}
.numbers div {{ background: var(--soft); border-radius: 8px; padding: 12px 16px; }}
.numbers b {{ display: block; font-size: 24px; font-variant-numeric: tabular-nums; }}
.numbers span, .numbers small {{ display: block; color: var(--faint); }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 4px 12px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
th button {{ all: unset; cursor: pointer; font-weight: 600; }}
th button:focus-visible {{ outline: 2px solid var(--mark); }}
th[aria-sort=ascending] button::after {{ content: " \\2191"; }}
th[aria-sort=descending] button::after {{ content: " \\2193"; }}
tbody tr:hover {{ background: var(--soft); }}
svg {{ width: 100%; min-width: 600px; font: 12px system-ui, sans-serif; }}
svg text {{ fill: var(--ink); }} svg .faint {{ fill: var(--faint); }}
svg line {{ stroke: var(--mark); }} svg line.grid {{ stroke: var(--line); }}
svg rect {{ fill: var(--mark); fill-opacity: .25; stroke: var(--mark); }}
svg line.median {{ stroke: var(--ink); stroke-width: 2; }} svg circle {{ fill: var(--mark); }}
svg .mean {{ fill: var(--back); stroke: var(--ink); }}
.pictures {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 16px; }}
figure {{ margin: 0; background: var(--soft); border-radius: 8px; overflow: hidden; }}
figure img {{ display: block; width: 100%; height: 240px; object-fit: contain; background: #101010; }}
figcaption {{ padding: 8px 12px; font-size: 13px; overflow-wrap: anywhere; }}
.legend span {{ margin-right: 18px; white-space: nowrap; }}
.legend i {{ display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px; }}
.errors li, footer {{ color: var(--faint); overflow-wrap: anywhere; }}
footer {{ margin-top: 40px; font-size: 13px; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
<footer>softdice {version}. Dice = 2 TP / (2 TP + FP + FN). A class that is in neither map of a case is not scored
there; a class in only one of them scores 0. Means skip what is not scored; pooled scores add the voxels of all cases
first. Intervals: percentile bootstrap over the cases.</footer>
<script>
for (const table of document.querySelectorAll("table")) {{
  table.querySelectorAll("th").forEach((head, column) => head.firstChild.addEventListener("click", () => {{
    const up = head.getAttribute("aria-sort") !== "ascending";
    table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const shown = row => row.cells[column].textContent;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {{
      const x = column ? parseFloat(shown(a)) : NaN, y = column ? parseFloat(shown(b)) : NaN;
      if (isNaN(x) !== isNaN(y)) return isNaN(x) ? 1 : -1;  // what has no score stays below
      const order = isNaN(x) ? shown(a).localeCompare(shown(b), undefined, {{ numeric: true }}) : x - y;
      return up ? order : -order;
    }});
    table.tBodies[0].append(...rows);
  }}));
}}
</script>
</body>
</html>
"""

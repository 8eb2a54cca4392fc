"""Template of the HTML report: style, and the script that sorts and filters. Double braces are for str.format."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="softdice">
<title>{title}</title>
<style>
:root {{ --ink: #1a1f26; --faint: #667080; --line: #dfe3e8; --back: #ffffff; --soft: #f4f6f8; --mark: #1f6feb;
  --bad: #b3261e; --shade: rgba(0, 0, 0, .18); }}
@media screen and (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6eaf0; --faint: #98a2b0; --line: #333b45; --back: #14181d; --soft: #1c2229; --mark: #6cabff;
    --bad: #ff8a80; --shade: rgba(255, 255, 255, .22); }}
}}
body {{ margin: 0 auto; max-width: 1240px; padding: 24px; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 22px; overflow-wrap: anywhere; }}
h2 {{ font-size: 18px; margin: 40px 0 12px; overflow-wrap: anywhere; }}
h3 {{ font-size: 15px; margin: 24px 0 8px; }}
.numbers {{ display: grid; gap: 12px; margin: 12px 0 20px;
  grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); }}
.numbers div {{ background: var(--soft); border-radius: 8px; padding: 12px 16px; }}
.numbers b {{ display: block; font-size: 24px; font-variant-numeric: tabular-nums; }}
.numbers span, .numbers small {{ display: block; color: var(--faint); }}
.scroll {{ overflow-x: auto; /* shadows where there is more to see */
  background: linear-gradient(to right, var(--back) 30%, transparent) left / 40px 100%,
    linear-gradient(to left, var(--back) 30%, transparent) right / 40px 100%,
    linear-gradient(to right, var(--shade), transparent) left / 14px 100%,
    linear-gradient(to left, var(--shade), transparent) right / 14px 100%;
  background-repeat: no-repeat; background-attachment: local, local, scroll, scroll; }}
table {{ border-collapse: collapse; min-width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 4px 8px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }}
th {{ vertical-align: bottom; white-space: normal; }}
th:first-child, td:first-child {{ text-align: left; white-space: normal; overflow-wrap: anywhere;
  min-width: clamp(110px, 12vw, 180px); position: sticky; left: 0; background: var(--back); }}
th span {{ cursor: pointer; font-weight: 600; }}
th span:focus-visible {{ outline: 2px solid var(--mark); }}
th[aria-sort=ascending] span::after {{ content: " \\2191"; }}
th[aria-sort=descending] span::after {{ content: " \\2193"; }}
td.zero, .plot em {{ color: var(--bad); font-style: normal; font-weight: 600; }}
tbody tr:hover, tbody tr:hover td:first-child {{ background: var(--soft); }}
input {{ font: inherit; color: inherit; background: var(--soft); border: 1px solid var(--line); border-radius: 6px;
  padding: 4px 10px; margin-bottom: 8px; width: 260px; max-width: 100%; box-sizing: border-box; }}
.plot div {{ display: grid; grid-template-columns: 280px 1fr; gap: 12px; align-items: center; }}
.plot span {{ text-align: right; font-size: 13px; line-height: 1.2; overflow-wrap: anywhere; }}
.plot svg {{ width: 100%; height: 22px; overflow: visible; font: 12px system-ui, sans-serif; }}
.plot .axis span {{ color: var(--faint); }}
svg text {{ fill: var(--ink); }} svg .faint {{ fill: var(--faint); }}
svg line {{ stroke: var(--mark); }} svg line.grid {{ stroke: var(--line); }}
svg rect {{ fill: var(--mark); fill-opacity: .25; stroke: var(--mark); }}
svg line.median {{ stroke: var(--ink); stroke-width: 2; }} svg circle {{ fill: var(--mark); }}
svg .mean {{ fill: var(--back); stroke: var(--ink); }}
.pictures {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 16px; }}
figure {{ margin: 0; background: var(--soft); border-radius: 8px; overflow: hidden; break-inside: avoid; }}
.view {{ display: flex; justify-content: center; align-items: center; height: 260px; background: #101010; }}
.frame {{ position: relative; display: block; line-height: 0; }}
.frame img {{ max-width: 100%; max-height: 260px; }}
.frame b, .frame i {{ position: absolute; color: #fff; font: 600 12px/1.2 system-ui, sans-serif;
  text-shadow: 0 0 3px #000, 0 0 3px #000; }}
.frame b {{ top: 45%; }} .frame b.left {{ left: 4px; }} .frame b.right {{ right: 4px; }}
.frame i {{ left: 8px; bottom: 8px; border-bottom: 2px solid #fff; font-style: normal; font-weight: 400;
  white-space: nowrap; }}
figcaption {{ padding: 8px 12px; font-size: 13px; overflow-wrap: anywhere; }}
.legend span {{ margin-right: 18px; white-space: nowrap; }}
.legend i {{ display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; font-size: 13px; }}
dt {{ color: var(--faint); }} dd {{ margin: 0; overflow-wrap: anywhere; }}
details {{ margin: 12px 0; }} summary {{ cursor: pointer; }}
nav ul {{ display: flex; flex-wrap: wrap; gap: 4px 20px; list-style: none; padding: 0; margin: 0 0 8px; }}
a {{ color: var(--mark); overflow-wrap: anywhere; }}
tfoot td {{ font-weight: 600; border-bottom: 0; }}
.meanings {{ font-size: 13px; color: var(--faint); }}
.meanings b {{ font-weight: 600; color: var(--ink); }}
.errors li, footer {{ color: var(--faint); overflow-wrap: anywhere; }}
footer {{ margin-top: 40px; font-size: 13px; }}
@media screen {{ :is(th, td):not(:first-child) wbr {{ display: none; }} }}
@media (max-width: 560px) {{
  body {{ padding: 12px; }}
  th, td {{ padding: 4px 8px; }}
  .plot div {{ grid-template-columns: 1fr; gap: 0; }} .plot span {{ text-align: left; }}
  dl {{ grid-template-columns: 1fr; }} dd {{ margin-bottom: 6px; }}
}}
@media print {{
  @page {{ size: A4; margin: 12mm; }}
  * {{ print-color-adjust: exact; -webkit-print-color-adjust: exact; }}
  body {{ max-width: none; padding: 0; font-size: 10pt; }}
  input, .screen, nav {{ display: none; }} .meanings {{ font-size: 7.5pt; }}
  .scroll {{ overflow: visible; background: none; }}
  table {{ font-size: 7.5pt; }} th, td {{ padding: 1.5pt 4pt; white-space: normal; }}
  th {{ overflow-wrap: anywhere; min-width: 34pt; }}
  table:has(th:nth-child(13)) th {{ overflow-wrap: normal; min-width: 0; }}
  table:has(th:nth-child(13)) {{ font-size: 6pt; letter-spacing: -.1pt; }}
  table:has(th:nth-child(13)) :is(th, td) {{ padding: 1.5pt 2pt; }}
  th:first-child, td:first-child {{ min-width: 55pt; position: static; }}
  .numbers {{ grid-template-columns: repeat(4, 1fr); }}
  thead {{ display: table-header-group; break-inside: avoid; }} tfoot {{ display: table-row-group; }}
  tr, .plot div, .numbers {{ break-inside: avoid; }}
  h2, h3, .legend {{ break-after: avoid; }}
  .plot div {{ grid-template-columns: 150px 1fr; }} .plot span {{ text-align: right; font-size: 8pt; }}
  .pictures {{ grid-template-columns: repeat(3, 1fr); }} .view, .frame img {{ height: auto; max-height: 200px; }}
}}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
<footer>Dice = 2 TP / (2 TP + FP + FN). A class that is in neither map of a case {empty}; a class in only one of them
scores 0. Means skip what is not scored; pooled scores add the voxels of all cases first. Intervals: percentile
bootstrap over the cases. softdice {version}.</footer>
<script>
for (const table of document.querySelectorAll("table")) {{
  table.querySelectorAll("th").forEach((head, column) => {{
   head.firstChild.addEventListener("keydown", event => {{
    if (event.key === "Enter" || event.key === " ") {{ event.preventDefault(); head.firstChild.click(); }}
   }});
   head.firstChild.addEventListener("click", () => {{
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
   }});
  }});
}}
for (const field of document.querySelectorAll("input")) field.addEventListener("input", () => {{
  const words = field.value.toLowerCase();
  for (const row of field.nextElementSibling.querySelector("tbody").rows)
    row.hidden = !row.cells[0].textContent.toLowerCase().includes(words);
}});
</script>
</body>
</html>
"""

#!/usr/bin/env bash
# Chromium is there, or apt-get brings Debian's; else says what this machine lacks, and fails.
set -uo pipefail
found() { command -v chromium || command -v chromium-browser || command -v google-chrome; }
found > /dev/null && exit
lacking="no Chromium, and"
if ! command -v apt-get > /dev/null; then
  lacking="$lacking no apt-get to install it"
elif [ "$(id -u)" != 0 ]; then
  lacking="$lacking no right to install it: sudo apt-get install chromium"
else
  echo "Installing Chromium with apt-get"
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update -qq && apt-get install -qq --no-install-recommends chromium fonts-dejavu-core; } > /dev/null 2>&1
  found > /dev/null && exit
  lacking="$lacking apt-get could not install it"
fi
echo "chromium: $lacking" >&2
exit 1

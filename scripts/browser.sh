#!/bin/sh
# Install a Chromium, in which slow tests look at the HTML reports. Where that cannot be done, say so: they are skipped.
set -eu

say() { printf '\n== %s\n' "$*"; }
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }

for name in chromium chromium-browser google-chrome google-chrome-stable \
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"; do
    if command -v "$name" >/dev/null 2>&1; then exit 0; fi
done

if command -v apt-get >/dev/null 2>&1; then
    say "installing the Debian package chromium (300 MB)"
    if as_root apt-get update -qq && as_root apt-get install -y -qq --no-install-recommends chromium; then exit 0; fi
fi
say "Chromium is missing and could not be installed, so nobody looks at the HTML reports: \`make test-all\` skips these
   tests and runs all others. To add it, ask an administrator for one of
      apt-get install chromium       (Debian)              dnf install chromium     (Fedora, RHEL)
      pacman -S chromium             (Arch)                zypper install chromium  (openSUSE)
      apk add chromium               (Alpine)              brew install --cask google-chrome  (macOS)"

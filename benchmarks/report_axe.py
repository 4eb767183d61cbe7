"""Looks for what keeps people from reading a report: axe-core over each page, light and dark, wide and narrow.

    npm install --prefix /tmp/axe axe-core
    python benchmarks/report_axe.py /tmp/axe/node_modules/axe-core/axe.min.js runs/laptop/report.html

Wants Chromium. Prints each finding; the exit code is 1 where one is serious or critical.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

VIEWS = {  # a preference of 0 is dark
    "light, 1200 px": ["--window-size=1200,2000"],
    "dark, 1200 px": ["--window-size=1200,2000", "--blink-settings=preferredColorScheme=0"],
    "light, 500 px": ["--window-size=500,2000"],
}
RUN = """<script>document.querySelectorAll('details').forEach(d => d.open = true);
axe.run({resultTypes: ['violations']}).then(found => {
  const told = found.violations.map(v => [v.impact, v.id, v.help, v.nodes.length, v.nodes[0].html.slice(0, 120)]);
  document.body.textContent = 'AXE' + JSON.stringify(told) + 'END';
});</script>"""


def findings(browser: str, axe: Path, page: Path, view: list[str]) -> list[list[object]]:
    """What axe says of a copy of the page that may run it."""
    source = page.read_text(encoding="utf-8")
    source = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", source)
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "page.html"
        code = axe.read_text(encoding="utf-8").replace("</script", "<\\/script")
        copy.write_text(source.replace("</body>", f"<script>{code}</script>{RUN}</body>"), encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=60000"]
        done = subprocess.run(
            [browser, *options, f"--user-data-dir={place}/profile", *view, copy.as_uri()],
            capture_output=True, text=True, timeout=180, check=True,
        )  # fmt: skip
    told = re.search(r"AXE(\[.*\])END", done.stdout, re.DOTALL)
    if not told:
        raise SystemExit(f"{page}: axe gave no answer")
    listed = told[1].replace("&lt;", "<").replace("&gt;", ">").replace("&nbsp;", " ").replace("&amp;", "&")
    return list(json.loads(listed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("axe", type=Path, help="axe.min.js of npm's axe-core")
    parser.add_argument("pages", type=Path, nargs="+")
    options = parser.parse_args()
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        raise SystemExit("no Chromium on this machine")
    serious = 0
    for page in options.pages:
        for view, arguments in VIEWS.items():
            told = findings(browser, options.axe, page, arguments)
            serious += sum(impact in ("serious", "critical") for impact, *_ in told)
            print(f"{page} ({view}): {len(told)} findings")
            for finding in told:
                print("  " + "  ".join(map(str, finding)))
    sys.exit(serious > 0)


if __name__ == "__main__":
    main()

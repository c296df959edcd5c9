"""Reads the JUnit reports of a test run, prints one table, and fails if a test failed or a report is missing.

Usage: summary.py FOLDER SUITE... where FOLDER/SUITE.xml is the report of each suite.
"""

import sys
import xml.etree.ElementTree as ET
from pathlib import Path


def counts(report: Path) -> tuple[int, int, int]:
    """Tests that passed, failed (or ended in an error) and were skipped."""
    passed = failed = skipped = 0
    for case in ET.parse(report).getroot().iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None or case.get("status") == "fail":
            failed += 1
        elif case.find("skipped") is not None or case.get("status") in ("notrun", "disabled"):
            skipped += 1
        else:
            passed += 1
    return passed, failed, skipped


def main(folder: Path, suites: list[str]) -> int:
    bad = False
    print(f"\n{'':<12}{'passed':>8}{'failed':>8}{'skipped':>9}")
    for suite in suites:
        reports = sorted(folder.glob(f"{suite}*.xml"))
        if not (folder / f"{suite}.xml").exists():
            print(f"{suite:<12}  did not run to its end")
            bad = True
        for report in reports:
            passed, failed, skipped = counts(report)
            print(f"{report.stem:<12}{passed:>8}{failed:>8}{skipped:>9}")
            bad |= failed > 0 or passed == 0
    print("FAILED" if bad else "all tests passed")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))

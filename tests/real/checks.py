"""What was checked, what came out, and tables of it."""

import sys


class Checks:
    """What was checked and what came out."""

    def __init__(self):
        self.lines = []

    def that(self, what, good, found=""):
        self.lines.append((what, bool(good), str(found)))
        print(f"{'ok    ' if good else 'FAILED'} {what}{f': {found}' if found != '' else ''}", file=sys.stderr)

    def equal(self, what, found, wanted):
        self.that(what, found == wanted, f"{found}" if found == wanted else f"{found}, expected {wanted}")

    def report(self):
        width = max(len(what) for what, _, _ in self.lines)
        print(f"| {'check':{width}} | result | found\n| {'-' * width} | ------ | -----")
        for what, good, found in self.lines:
            print(f"| {what:{width}} | {'ok    ' if good else 'FAILED'} | {found}")
        failed = sum(not good for _, good, _ in self.lines)
        print(f"\n{len(self.lines) - failed} passed, {failed} failed")
        return failed == 0


def table(title, rows):
    print(f"\n{title}\n")
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(rows[0]))]
    for number, row in enumerate(rows):
        print("| " + " | ".join(str(cell).ljust(width) for cell, width in zip(row, widths)) + " |")
        if number == 0:
            print("| " + " | ".join("-" * width for width in widths) + " |")
    print()

"""A ledger of accounts: what `drafts.py` asks a model to change."""

import csv
import datetime
import decimal
import pathlib

ROUNDING = decimal.Decimal("0.01")
MAX_ENTRIES = 10_000


class LedgerError(Exception):
    """An entry or a file that cannot be taken."""


class Entry:
    """Money that went from one account to another."""

    def __init__(self, day, source, target, amount, note=""):
        if source == target:
            raise LedgerError(f"{source} cannot pay itself")
        if amount <= 0:
            raise LedgerError(f"an amount is positive, not {amount}")
        self.day = day
        self.source = source
        self.target = target
        self.amount = amount.quantize(ROUNDING)
        self.note = note

    def touches(self, account):
        return account in (self.source, self.target)


class Ledger:
    """Entries in the order of their days."""

    def __init__(self, currency):
        self.currency = currency
        self.entries = []

    def add(self, entry):
        if len(self.entries) >= MAX_ENTRIES:
            raise LedgerError("the ledger is full")
        index = len(self.entries)
        while index > 0 and self.entries[index - 1].day > entry.day:
            index -= 1
        self.entries.insert(index, entry)

    def balance(self, account, until=None):
        total = decimal.Decimal(0)
        for entry in self.entries:
            if until is not None and entry.day > until:
                break
            if entry.target == account:
                total += entry.amount
            elif entry.source == account:
                total -= entry.amount
        return total

    def accounts(self):
        names = set()
        for entry in self.entries:
            names.add(entry.source)
            names.add(entry.target)
        return sorted(names)

    def statement(self, account):
        lines = [f"Statement of {account} in {self.currency}"]
        total = decimal.Decimal(0)
        for entry in self.entries:
            if not entry.touches(account):
                continue
            amount = entry.amount if entry.target == account else -entry.amount
            total += amount
            lines.append(f"{entry.day.isoformat()} {amount:>12} {total:>12} {entry.note}")
        return "\n".join(lines)

    def save(self, path):
        with pathlib.Path(path).open("w", newline="") as file:
            writer = csv.writer(file)
            for entry in self.entries:
                writer.writerow([entry.day.isoformat(), entry.source, entry.target, entry.amount, entry.note])

    @classmethod
    def load(cls, path, currency):
        ledger = cls(currency)
        with pathlib.Path(path).open(newline="") as file:
            for number, row in enumerate(csv.reader(file), start=1):
                try:
                    day, source, target, amount, note = row
                    date = datetime.date.fromisoformat(day)
                    ledger.add(Entry(date, source, target, decimal.Decimal(amount), note))
                except (ValueError, decimal.InvalidOperation) as error:
                    raise LedgerError(f"line {number} of {path}: {error}") from error
        return ledger

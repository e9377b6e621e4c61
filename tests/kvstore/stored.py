"""What a disk tier has stored, changed by hand."""

from kvstore.disk.values import PAGE_BYTES, PREFIX
from kvstore.record import HEADER_BYTES


def values_file(folder):
    """The file of all KV in a store's folder."""
    (found,) = folder.glob(f"{PREFIX}*")
    return found


def entry_of(tier, key):
    with tier.access.reading() as txn:
        return tier.access.ledger.get(txn, key.digest)


def place_of(tier, key, number=0):
    """Where a record begins in the values file."""
    return entry_of(tier, key).pages[number] * PAGE_BYTES


def change_record(tier, key, number, change):
    """Replace the bytes of a record, header and payload, by as many or fewer."""
    entry, values = entry_of(tier, key), tier.access.ledger.env.values
    stored = bytes(values.record(entry.pages[number], entry.sizes[number]))
    changed, place = change(stored).ljust(len(stored), b"\0"), place_of(tier, key, number)
    with values.path.open("r+b") as file:
        file.seek(place)
        file.write(changed[:HEADER_BYTES])
        file.seek(place + PAGE_BYTES)
        file.write(changed[HEADER_BYTES:])


def flip(tier, key, number=0, at=-1):
    """Change one bit of a record."""

    def change(stored):
        changed = bytearray(stored)
        changed[at] ^= 1
        return bytes(changed)

    change_record(tier, key, number, change)

"""KV of running requests in the memory of a device."""

from kvstore.pool.pool import Pool


class DeviceTier(Pool):
    """A pool on a torch device, a GPU or the CPU itself."""

    name = "device"
    setting = "device_bytes"

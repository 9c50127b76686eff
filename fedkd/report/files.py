"""The old place of `fedkd.files.write_atomic`."""

from fedkd.files import write_atomic as write_atomic

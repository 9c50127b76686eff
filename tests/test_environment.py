"""What a run says of the machine that it was computed on."""

from pathlib import Path

from fedkd.environment import processor_vendor


def test_the_vendor_is_what_the_processor_says(monkeypatch):
    says = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\n"
    monkeypatch.setattr(Path, "read_text", lambda path: says)
    assert processor_vendor() == "AuthenticAMD"

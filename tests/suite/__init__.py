"""Tests that several files collect, with other devices and backends, or that planted faults must fail."""

"""The committed gRPC stubs are those of the committed schema."""

from __future__ import annotations

from pathlib import Path

from jserve.server.proto.generate import ROOT, generate


def test_the_stubs_are_up_to_date(tmp_path: Path) -> None:
    assert generate(tmp_path) == 0
    made = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(made) == 3
    for path in made:
        committed = ROOT / path.relative_to(tmp_path)
        assert _without_versions(path) == _without_versions(committed)


def _without_versions(path: Path) -> list[str]:
    """What protoc's own version changes is not a difference."""
    skip = ("# Protobuf Python Version", "GRPC_GENERATED_VERSION", "    ")
    return [line for line in path.read_text().splitlines() if not line.startswith(skip)]

"""A conversation's KV as a snapshot that moves between servers: `jserve session export` and `import`.

    DIR/session.json    model, fingerprint, layout and token ids, and a digest over them and the KV
    DIR/kv/             Orbax: one array `kv`, [blocks, layers, K and V, block_size, kv_heads, head_dim]

Both ends are the directory (or URL) of a disk tier, so that no server need run: export reads the blocks that a server
has written there, import writes them where another will find them when it starts. A snapshot is used only whole, and
only by the model, weights and block size that computed it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from jserve.cache.block_keys import extend_keys, root_key
from jserve.cache.disk_store import DiskCompletion, DiskStore, Outcome, stored_models
from jserve.config import EngineConfig
from jserve.errors import ConfigError, NotFound
from jserve.progress import Progress
from jserve.publish import publish_directory

FORMAT = 1
_ABOUT = "session.json"

Blocks = Shaped[np.ndarray, "blocks layers 2 block_size kv_heads head_dim"]


@dataclass(frozen=True)
class KVLayout:
    """What two servers must agree in to use each other's KV."""

    model: str
    fingerprint: str
    """Of the model with its weights (`EngineInfo.fingerprint`)."""
    dtype: str
    block_shape: tuple[int, ...]
    """[layers, K and V, block_size, kv_heads, head_dim]"""

    @classmethod
    def of(cls, config: EngineConfig, directory: str, progress: Progress) -> KVLayout:
        """As a server of this configuration has it; loads the model, for its weights are part of the fingerprint."""
        from jserve.runner import Runner

        cache = replace(config.cache, device_blocks=1, host_gib=1.0, disk_dir=directory)
        runner = Runner.from_config(replace(config, cache=cache, runner=replace(config.runner, warmup=False)), progress)
        try:
            shape = tuple(runner.programs.block_shape())
            return cls(runner.info.model, runner.info.fingerprint, runner.info.dtype, shape)
        finally:
            runner.close()

    @property
    def block_size(self) -> int:
        return self.block_shape[2]

    def empty(self, num_blocks: int) -> Blocks:
        import ml_dtypes  # noqa: F401  (teaches NumPy the name bfloat16)

        return np.empty((num_blocks, *self.block_shape), np.dtype(self.dtype))

    def keys(self, token_ids: Sequence[int], cache_salt: str) -> list[bytes]:
        keys: list[bytes] = []
        extend_keys(keys, root_key(self.fingerprint, cache_salt), token_ids, self.block_size)
        return keys


def export_session(
    layout: KVLayout, directory: str, token_ids: Sequence[int], snapshot: Path, cache_salt: str = ""
) -> int:
    """Write the KV of the leading full blocks of `token_ids` that `directory` has as a new snapshot; how many tokens.

    ConfigError if the snapshot exists already or the directory cannot be read, NotFound if it has no block of these.
    """
    if snapshot.exists():
        raise ConfigError(f"{snapshot} exists already: choose another directory, or remove it")
    block_bytes = layout.empty(1).nbytes
    if "://" not in directory and not any(
        (stored.fingerprint, stored.block_bytes) == (layout.fingerprint, block_bytes)
        for stored in stored_models(Path(directory))
    ):
        raise NotFound(
            f"{directory} has no KV of {layout.model} in {layout.dtype} with blocks of {layout.block_size} tokens: "
            "name the --disk-dir, --model, --dtype and --block-size of the server that talked"
        )
    with _opened(layout, directory) as store:
        blocks = _read_chain(store, layout, layout.keys(token_ids, cache_salt))
    if not len(blocks):
        raise NotFound(
            f"{directory} has no block of this conversation: give its messages, and its --cache-salt if it had one, as "
            "the server got them"
        )
    held = [int(token) for token in token_ids[: len(blocks) * layout.block_size]]
    _save(snapshot, layout, held, blocks)
    return len(held)


def import_session(layout: KVLayout, directory: str, snapshot: Path, cache_salt: str = "") -> int:
    """Put a snapshot's blocks into `directory`, for servers that start later; how many tokens they hold.

    ConfigError, and nothing is imported, if the snapshot is damaged or another model's; or if a write fails.
    """
    token_ids, blocks = _load(snapshot, layout)
    with _opened(layout, directory) as store:
        for i, key in enumerate(layout.keys(token_ids, cache_salt)):
            store.write(i, key, blocks[i])
        for end in _ended(store, len(blocks)):
            if end.outcome is not Outcome.OK:
                raise ConfigError(f"a KV block cannot be written to {directory}: {end.detail}")
    return len(token_ids)


# --- the disk tier's directory ----------------------------------------------------------------------------------------


@contextmanager
def _opened(layout: KVLayout, directory: str) -> Iterator[DiskStore]:
    store = DiskStore.open(directory, layout.fingerprint, layout.empty(1).nbytes)
    try:
        yield store
    finally:
        store.close()


def _read_chain(store: DiskStore, layout: KVLayout, keys: list[bytes]) -> Blocks:
    """The blocks up to the first that is not there, or is damaged."""
    blocks = layout.empty(len(keys))
    for i, key in enumerate(keys):
        store.read(i, key, blocks[i])
    outcomes = {}
    for end in _ended(store, len(keys)):
        if end.outcome is Outcome.FAILED:
            raise ConfigError(f"a KV block cannot be read: {end.detail}")
        outcomes[end.ticket] = end.outcome
    whole = next((i for i in range(len(keys)) if outcomes[i] is not Outcome.OK), len(keys))
    return blocks[:whole]


def _ended(store: DiskStore, count: int) -> list[DiskCompletion]:
    ended: list[DiskCompletion] = []
    while len(ended) < count:
        time.sleep(0.001)
        ended += store.poll()
    return ended


# --- the snapshot -----------------------------------------------------------------------------------------------------


def _save(snapshot: Path, layout: KVLayout, token_ids: list[int], blocks: Blocks) -> None:
    import orbax.checkpoint as ocp  # seconds to import, so only where it is used

    about: dict[str, Any] = {"format": FORMAT, **asdict(layout), "token_ids": token_ids}
    with publish_directory(snapshot) as staging:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((staging / "kv").absolute(), {"kv": blocks})
        about["digest"] = _digest(layout, token_ids, blocks)
        (staging / _ABOUT).write_text(json.dumps(about) + "\n", "utf-8")


def _load(snapshot: Path, layout: KVLayout) -> tuple[list[int], Blocks]:
    """Token ids and blocks, once all is found whole and of this layout."""
    import orbax.checkpoint as ocp

    if not (snapshot / _ABOUT).is_file():
        raise ConfigError(f"{snapshot} is no session: name a directory that `jserve session export` wrote")
    try:
        about = json.loads((snapshot / _ABOUT).read_text("utf-8"))
        version, token_ids, digest = about["format"], [int(token) for token in about["token_ids"]], about["digest"]
        theirs = KVLayout(about["model"], about["fingerprint"], about["dtype"], tuple(about["block_shape"]))
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(snapshot, error) from None
    if version != FORMAT:
        raise ConfigError(f"{snapshot} has format {version!r}, and this jserve reads {FORMAT}: export it again")
    _check_layout(snapshot, theirs, layout)
    wanted = {"kv": layout.empty(len(token_ids) // layout.block_size)}
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            blocks = np.asarray(checkpointer.restore((snapshot / "kv").absolute(), wanted)["kv"])
    except Exception as error:  # Orbax and TensorStore report a damaged tree in many ways
        raise _damaged(snapshot, error) from None
    if blocks.shape != wanted["kv"].shape or _digest(layout, token_ids, blocks) != digest:
        raise _damaged(snapshot, ValueError("the digest is wrong"))
    return token_ids, blocks


def _check_layout(snapshot: Path, theirs: KVLayout, ours: KVLayout) -> None:
    if theirs.fingerprint != ours.fingerprint:
        raise ConfigError(
            f"{snapshot} is a session of {theirs.model} in {theirs.dtype}, and this is {ours.model} in {ours.dtype} "
            "or has other weights: import it for the model that computed it"
        )
    if theirs.block_shape != ours.block_shape:
        raise ConfigError(
            f"{snapshot} has blocks of {theirs.block_size} tokens, and here they have {ours.block_size}: "
            f"serve and import with --block-size {theirs.block_size}"
        )


def _digest(layout: KVLayout, token_ids: list[int], blocks: Blocks) -> str:
    said = json.dumps([FORMAT, layout.fingerprint, layout.dtype, layout.block_shape, token_ids])
    digest = blake2b(said.encode(), digest_size=16)
    digest.update(np.ascontiguousarray(blocks).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _damaged(snapshot: Path, error: Exception) -> ConfigError:
    said = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return ConfigError(f"{snapshot} is damaged ({said}): export the session again")

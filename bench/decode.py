"""`python -m bench.decode`: how long one decode step takes, by batch size, on the engine in this process.

Without a server, sockets or text: the model, the paged cache and the step loop alone. `--shape` takes a model's shape
with random weights, so that no checkpoint is needed.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from statistics import median

import jax

from bench import report
from jserve.config import CacheConfig, EngineConfig, RunnerConfig, SchedConfig
from jserve.console import RichProgress
from jserve.engine import Engine
from jserve.errors import ConfigError, JserveError
from jserve.models.placement import init_random
from jserve.models.registry import parse_config
from jserve.request import EngineRequest, SamplingParams
from jserve.runner import Runner, make_mesh, resolve_dtype

_LLAMA_2 = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
SHAPES = {
    "tiny": _LLAMA_2 | {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 688},
    "llama-2-7b": _LLAMA_2
    | {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008},
    "llama-2-13b": _LLAMA_2
    | {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13824},
}


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    config = EngineConfig(
        model=args.model,
        cache=CacheConfig(device_blocks=args.device_blocks),
        sched=SchedConfig(max_running=max(args.batch)),
        runner=RunnerConfig(attention_backend=args.attention_backend),
    )
    bandwidth = copy_bandwidth()
    try:
        engine = _random_engine(config, args.shape) if args.shape else Engine.from_config(config, RichProgress())
        rows = [_measure(engine, batch, args, bandwidth) for batch in args.batch]
    except JserveError as error:
        print(f"bench.decode: {error}", file=sys.stderr)
        return 2
    columns = ("batch", "step p50 ms", "tokens/s", "least ms", "over least", "host ms")
    report.console(args).print(report.table(f"decode, {engine.info.model}, {engine.info.backend}", columns, rows))
    metrics = {f"step_ms_{row[0]}": row[1] for row in rows} | {f"tokens_per_s_{row[0]}": row[2] for row in rows}
    metrics |= {f"host_step_ms_{row[0]}": row[5] for row in rows}
    metrics |= {"compiles_after_warmup": engine.stats().compiles_after_warmup}
    settings = {"model": engine.info.model, "dtype": engine.info.dtype, "backend": engine.info.backend}
    settings |= {"batch": args.batch, "context": args.context, "steps": args.steps}
    report.emit(report.Result("decode", metrics, settings, args.seed), args)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=__doc__)
    parser.add_argument("--model", help="directory, GGUF file or hub id (default: the embedded model)")
    parser.add_argument("--shape", choices=SHAPES, help="a shape with random weights instead of a model")
    parser.add_argument("--batch", type=_counts, default=[1, 4, 8, 16, 32, 64], help="batch sizes (1,4,8,16,32,64)")
    parser.add_argument("--context", type=int, default=512, help="tokens before the first decode (512)")
    parser.add_argument("--steps", type=int, default=48, help="decode steps a batch size (48)")
    parser.add_argument("--device-blocks", type=int, help="KV pool (default: from free memory)")
    parser.add_argument("--attention-backend", choices=("auto", "native", "xla", "pallas"), default="auto")
    report.add_arguments(parser)
    return parser


def _counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _random_engine(config: EngineConfig, shape: str) -> Engine:
    mesh = make_mesh(config.tp)
    spec = parse_config(SHAPES[shape], shape)
    model = init_random(spec, mesh, resolve_dtype(config.dtype, mesh))
    runner = Runner(config, model, spec, f"{shape} (random weights)", mesh, RichProgress())
    return Engine(config, runner.info, runner)


def _measure(
    engine: Engine, batch: int, args: argparse.Namespace, bandwidth: float
) -> tuple[int, float, float, float, float, float]:
    """Step time once all rows decode; the least possible is reading weights and KV once, at copy bandwidth."""
    rng, context, steps = random.Random(args.seed), args.context, args.steps
    names = [f"{batch}-{i}" for i in range(batch)]
    for name in names:
        prompt = [rng.randrange(engine.info.vocab_size) for _ in range(context)]
        engine.add(EngineRequest(request_id=name, token_ids=prompt, sampling=SamplingParams()))
    times_s: list[float] = []
    while len(times_s) <= steps:
        start_s = time.perf_counter()
        outputs = engine.step()
        if len(outputs) == batch:  # every row got a token: a whole decode step
            times_s.append(time.perf_counter() - start_s)
        elif any(output.finish_reason for output in outputs):
            raise ConfigError(f"{batch} rows never decode together: use a smaller --batch or --context")
    for name in names:
        engine.abort(name)
    while engine.has_work:
        engine.step()
    step_s = median(times_s[1:])
    kv_bytes = (
        engine.info.pool_bytes / engine.info.device_blocks / engine.info.block_size * (context + steps / 2) * batch
    )
    least_s = (engine.info.weight_bytes + kv_bytes) / bandwidth
    host_ms = median(r.host_s for r in engine.step_records() if r.num_tokens == batch) * 1e3
    return batch, step_s * 1e3, batch / step_s, least_s * 1e3, step_s / least_s, host_ms


def copy_bandwidth(size_bytes: int = 1 << 28) -> float:
    """Bytes a second that the device reads and writes in a large copy."""
    touch = jax.jit(lambda x: x + 1, donate_argnums=0)  # in place: no page is new
    x = jax.block_until_ready(touch(jax.numpy.zeros(size_bytes // 4, jax.numpy.float32)))
    times_s = []
    for _ in range(5):
        start_s = time.perf_counter()
        x = jax.block_until_ready(touch(x))
        times_s.append(time.perf_counter() - start_s)
    return 2 * size_bytes / median(times_s)


if __name__ == "__main__":
    sys.exit(main())

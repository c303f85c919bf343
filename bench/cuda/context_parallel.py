"""One layer of a long prompt on one GPU and on all of them: zigzag by groups of heads, Ulysses.

    python3 bench/cuda/context_parallel.py [--ranks 2] [--tokens 65536,131072,524288] [--out FILE]

32 query heads, 8 KV heads of 128, bf16, causal; inputs have topics as operator_bench.py's, and alpha is set
to reach each density. A time is that of several calls one after the other, as layers are, between two
events; the largest over the ranks; medians over turns in which all contenders take part. "Attention alone"
is the same calls without the transfer, over what was gathered before: what the transfer adds to it is
exposed. Each contender's rows on rank 0 are compared with one GPU's, bit by bit. Before that, the all-gather
alone and a copy from GPU to GPU. `--device cpu` runs it small, over gloo.

`--parts 2` needs one GPU: it does what each of two ranks would do, one rank after the other, over keys that
lie there already. The slower part is what two GPUs would take with a transfer that takes no time.
"""

import argparse
import datetime
import json
import os
import socket
import statistics
import sys
import time

import torch
import torch.distributed as dist
import torch.multiprocessing

import flashprefill as fp
from flashprefill.distributed import collectives

POLICIES = {
    "FlashPrefill, query_pool=16": lambda alpha: fp.FlashPrefill(alpha=alpha, query_pool=16),
    "Sketch": lambda alpha: fp.Sketch(alpha=alpha),
}


class Anything:
    """What all ranks are known to agree on, where there are no others."""

    def __contains__(self, call):
        return True


class Bench:
    """What one process measures."""

    def __init__(self, arguments, rank, ranks):
        self.a, self.rank, self.ranks = arguments, rank, ranks
        self.cuda = arguments.device == "cuda"
        self.device = torch.device("cuda", rank) if self.cuda else torch.device("cpu")
        self.rows = []

    def inputs(self, tokens):
        """q, k, v: [tokens, heads, dim], with topics of 256 tokens; a rank at a time holds them in fp32."""
        make = torch.Generator(self.device).manual_seed(tokens)
        heads, kv_heads, dim = self.a.heads
        topics = torch.randn(64, dim, generator=make, device=self.device)

        def noise(count):
            return torch.randn(tokens, count, dim, generator=make, device=self.device, dtype=self.a.dtype)

        def topic(count, run):
            which = torch.randint(64, (tokens // run, count), generator=make, device=self.device)
            return (0.5 * topics).to(self.a.dtype)[which.repeat_interleave(run, 0)]

        return (
            noise(heads).add_(topic(heads, 128)),
            noise(kv_heads).add_(topic(kv_heads, 256)),
            noise(kv_heads),
        )

    def tuned(self, q, k, make, density):
        """The policy of this density; rank 0 finds it."""
        found = [0.0]
        if self.rank == 0:
            low, high = 0.0, 1.0
            for _ in range(10):
                alpha = (low + high) / 2
                at = fp.select(q, k, make(alpha)).density
                low, high = (alpha, high) if at > density else (low, alpha)
            found = [(low + high) / 2]
        dist.broadcast_object_list(found)
        return make(found[0])

    def milliseconds(self, call, calls, alone=False):
        """The time of a call, the largest over the ranks; `alone`: rank 0 makes it, and the others wait."""
        dist.barrier()
        took = 0.0
        if not alone or self.rank == 0:
            if self.cuda:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                for _ in range(calls):
                    call()
                end.record()
                end.synchronize()
                took = begin.elapsed_time(end) / calls
            else:
                start = time.perf_counter()
                for _ in range(calls):
                    call()
                took = (time.perf_counter() - start) * 1e3 / calls
        result = torch.tensor([took], device=self.device)
        dist.all_reduce(result, op=dist.ReduceOp.MAX)
        return float(result)

    def transfers(self, tokens):
        """All-gather of K and V alone, and a copy from GPU to GPU: GB/s into each GPU."""
        _, kv_heads, dim = self.a.heads
        shape = (self.ranks, 2, tokens // self.ranks, kv_heads, dim)
        buffer = torch.zeros(shape, dtype=self.a.dtype, device=self.device)
        ms = statistics.median(
            self.milliseconds(lambda: collectives.all_gather(buffer, self.rank, None), 5) for _ in range(5)
        )
        arriving = buffer.numel() * buffer.element_size() * (self.ranks - 1) // self.ranks
        row = {
            "tokens": tokens,
            "name": "all-gather of K and V alone",
            "ms": ms,
            "gb_per_s": arriving / ms / 1e6,
        }
        self.note({**row, "bytes_into_each": arriving})
        if self.cuda and tokens == max(self.a.tokens):
            there = torch.empty_like(buffer, device=f"cuda:{(self.rank + 1) % self.ranks}")
            ms = self.milliseconds(lambda: there.copy_(buffer), 3, alone=True)
            size = buffer.numel() * buffer.element_size()
            self.note({"tokens": tokens, "name": "copy, GPU to GPU", "ms": ms, "gb_per_s": size / ms / 1e6})

    def contenders(self, parts, policy, tokens):
        """Calls by name: over all ranks."""
        heads = self.a.heads[1]
        zigzag, ulysses = fp.distributed.Zigzag(tokens), fp.distributed.Ulysses(tokens)
        local = {shards: [shards.shard(x) for x in parts] for shards in (zigzag, ulysses)}

        def over(shards, groups):
            return lambda: fp.distributed.prefill_attention(
                *local[shards], policy, shards=shards, head_groups=groups
            )

        def silent(call):
            def without():
                gather, collectives.all_gather = collectives.all_gather, lambda *_, **__: None
                try:
                    call()
                finally:
                    collectives.all_gather = gather

            return without

        calls = {}
        for groups in (n for n in self.a.groups if heads % n == 0):
            calls[f"zigzag, {groups} groups"] = over(zigzag, groups)
            calls[f"zigzag, {groups} groups: attention alone"] = silent(over(zigzag, groups))
        if tokens <= self.a.ulysses_up_to:
            calls["ulysses"] = over(ulysses, None)
        return calls, {name: ulysses if name == "ulysses" else zigzag for name in calls}

    def measure(self, tokens):
        """All contenders at one length."""
        whole = self.inputs(tokens)
        for name, make in POLICIES.items():
            for density in self.a.densities:
                policy = self.tuned(*whole[:2], make, density)
                calls, shards = self.contenders(whole, policy, tokens)
                want = None
                if self.rank == 0:
                    want, stats = fp.prefill_attention(*whole, policy, return_stats=True)
                    density = stats.mean_density
                equal = {}
                for contender, call in calls.items():  # the first time agrees, makes buffers, warms up
                    got = call()
                    if want is not None and got is not None:
                        equal[contender] = torch.equal(got, shards[contender].shard(want))
                del want
                every = max(1, min(8, 524288 // tokens))
                calls = {"one GPU": lambda policy=policy: fp.prefill_attention(*whole, policy), **calls}
                times = {contender: [] for contender in calls}
                for _ in range(self.a.turns):
                    for contender, call in calls.items():
                        times[contender].append(self.milliseconds(call, every, contender == "one GPU"))
                self.report(tokens, name, policy, density, times, equal)

    def measure_parts(self, tokens):
        """What each of several ranks would do, at one length."""
        collectives.all_gather = lambda *_, **__: None
        whole = self.inputs(tokens)
        for name, make in POLICIES.items():
            for density in self.a.densities:
                policy = self.tuned(*whole[:2], make, density)
                want, stats = fp.prefill_attention(*whole, policy, return_stats=True)
                calls, equal = {"one GPU": lambda policy=policy: fp.prefill_attention(*whole, policy)}, {}
                for rank in range(self.a.parts):
                    for rounds in self.a.rounds:
                        shards, call = self.part(whole, policy, tokens, rank, rounds)
                        contender = f"rank {rank} of {self.a.parts}, {rounds} rounds"
                        calls[contender] = call
                        equal[contender] = torch.equal(call(), shards.shard(want))
                del want
                times = {contender: [] for contender in calls}
                for _ in range(self.a.turns):
                    for contender, call in calls.items():
                        times[contender].append(self.milliseconds(call, max(1, min(8, 524288 // tokens))))
                self.report(tokens, name, policy, stats.mean_density, times, equal)

    def part(self, whole, policy, tokens, rank, rounds):
        """A rank's shards, and its call over keys of all ranks."""
        shards, *others = (
            fp.distributed.Zigzag(tokens, ranks=self.a.parts, rank=r, rounds=rounds)
            for r in (rank, *(other for other in range(self.a.parts) if other != rank))
        )
        shards.agreed = Anything()
        own = [shards.shard(x) for x in whole]

        def call():
            return fp.distributed.prefill_attention(*own, policy, shards=shards)

        call()  # makes the buffers
        for other in others:
            first = 0
            for buffer in shards._buffers:
                past = first + buffer.shape[3]
                for which, x in enumerate(whole[1:]):
                    rows = other.shard(x)[:, first:past]
                    for row, slot, count in shards.pages.moves[other.rank]:
                        buffer[other.rank, which, slot : slot + count] = rows[row : row + count]
                first = past
        return shards, call

    def report(self, tokens, name, policy, density, times, equal):
        """Note the rows of one policy."""
        medians = {contender: statistics.median(all_times) for contender, all_times in times.items()}
        for contender, ms in medians.items():
            row = {
                "tokens": tokens,
                "policy": name,
                "alpha": policy.alpha,
                "density": density,
                "name": contender,
            }
            row |= {"ms": ms, "speed_up": medians["one GPU"] / ms, "least_ms": min(times[contender])}
            alone = medians.get(f"{contender}: attention alone")
            if alone is not None:
                row["exposed"] = max(0.0, ms - alone) / ms
            if contender in equal:
                row["equal_bits"] = equal[contender]
            self.note(row)

    def note(self, row):
        """Keep a row, and print it."""
        self.rows.append(row)
        if self.rank == 0:
            more = [f"{key} {row[key]:.3f}" for key in ("speed_up", "exposed", "gb_per_s") if key in row]
            more += [f"equal bits: {row['equal_bits']}"] if "equal_bits" in row else []
            what = f"{row['policy']:28s} {row['density']:.3f} " if "policy" in row else ""
            print(
                f"{row['tokens']:8d} {what}{row['name']:34s} {row['ms']:9.3f} ms  {'  '.join(more)}",
                flush=True,
            )

    def write(self):
        """Write rows with what makes a figure of them."""
        heads, kv_heads, dim = self.a.heads
        results = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": " ".join(["python3", *sys.argv]),
            "device": torch.cuda.get_device_name() if self.cuda else "cpu",
            "ranks": self.ranks,
            "backend": dist.get_backend(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if self.cuda else None,
            "multicast": os.environ.get("NCCL_NVLS_ENABLE", "") != "0",
            "torch": torch.__version__,
            "flashprefill": fp.__version__,
            "shape": {"q_heads": heads, "kv_heads": kv_heads, "head_dim": dim, "dtype": str(self.a.dtype)},
            "rows": self.rows,
        }
        with open(self.a.out, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


def work(rank, arguments, port):
    """One process."""
    ranks = arguments.ranks
    if arguments.device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    backend = "nccl" if arguments.device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    with torch.inference_mode():
        bench = Bench(arguments, rank, ranks)
        for tokens in arguments.tokens:
            if arguments.parts:
                bench.measure_parts(tokens)
            else:
                bench.transfers(tokens)
                bench.measure(tokens)
            if rank == 0 and arguments.out:
                bench.write()
    dist.destroy_process_group()


def numbers(kind):
    """A parser of lists."""
    return lambda text: [kind(part) for part in text.split(",")]


def main():
    """Read the command line and start the processes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, help="processes; the default is one per GPU")
    parser.add_argument("--parts", type=int, help="one GPU does the part of each of so many ranks")
    parser.add_argument("--rounds", type=numbers(int), default=[2, 4], help="of zigzag, with --parts")
    parser.add_argument("--tokens", type=numbers(int), default=[65536, 131072, 524288])
    parser.add_argument("--densities", type=numbers(float), default=[0.05, 0.02])
    parser.add_argument("--groups", type=numbers(int), default=[1, 2, 4], help="groups of KV heads")
    parser.add_argument(
        "--heads", type=numbers(int), default=[32, 8, 128], help="query heads, KV heads, head_dim"
    )
    parser.add_argument("--ulysses-up-to", type=int, default=131072, help="tokens")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    arguments.ranks = 1 if arguments.parts else arguments.ranks or torch.cuda.device_count()
    arguments.dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (arguments, port), nprocs=arguments.ranks)


if __name__ == "__main__":
    main()

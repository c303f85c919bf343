"""What a guard costs on a GPU: the operator with and without one, by turns in one run.

    python3 bench/cuda/guard_bench.py [--tokens 8192,131072] [--rows N] [--target TARGET] [--out FILE]

Inputs, shapes and timing are operator_bench.py's: 32 query heads, 8 KV heads, head_dim 128, bf16, causal,
calls in CUDA graphs, medians, alpha set so that the density is that of the table in the papers. "observe"
audits; "strict, low target" and "repair, low target" act on heads of which more than 1 in 20 rows keep
less than half; "repair, all" finds every head to keep too little. "audit alone" is fp.audit over the mask.
"""

import argparse
import json
import statistics

import torch
from operator_bench import DENSITY, clock, graph_of, inputs, milliseconds, tuned, write_results

import flashprefill as fp


def guards(rows):
    """Named guards that audit so many rows per head."""
    return {
        "none": None,
        "observe": fp.Guard(rows=rows),
        "strict, low target": fp.Guard("strict", target=1e-6, rows=rows),
        "repair, low target": fp.Guard("repair", target=1e-6, rows=rows),
        "repair, all": fp.Guard("repair", target=1.0, rows=rows),
    }


def measure(tokens, turns, target, audited):
    """All guards at one length, for two policies."""
    q, k, v = inputs(tokens)
    alpha = tuned(q, k, lambda a: fp.FlashPrefill(alpha=a, query_pool=16), DENSITY[tokens]).alpha
    policies = {
        "FlashPrefill, query_pool=16": fp.FlashPrefill(alpha=alpha, query_pool=16),
        "Sketch": fp.Sketch(alpha=alpha),
    }
    rows = []
    alone = fp.Guard(rows=audited)
    for label, policy in policies.items():
        mask = fp.select(q, k, policy, target=target)
        found = fp.audit(q, k, mask, alone, target=target)
        graphs = {}
        for name, guard in guards(audited).items():

            def call(guard=guard, policy=policy):
                fp.prefill_attention(q, k, v, policy, guard=guard, target=target)

            graphs[name] = graph_of(call)
        graphs["audit alone"] = graph_of(lambda mask=mask: fp.audit(q, k, mask, alone, target=target))
        graphs["select alone"] = graph_of(lambda policy=policy: fp.select(q, k, policy, target=target))
        times = {name: [] for name in graphs}
        for _ in range(turns):
            for name, graph in graphs.items():
                times[name].append(milliseconds(graph, max(1, 65536 // tokens)))
        base = statistics.median(times["none"])
        rows += [
            {
                "tokens": tokens,
                "policy": label,
                "guard": name,
                "density": mask.density,
                "rows": int(found.rows_audited.max()),
                "recall": float(found.recall.mean()),
                "ms": statistics.median(t),
                "over_none": statistics.median(t) / base - 1,
                # By turns: what the clock did to one did it to both.
                "more_ms": statistics.median(x - y for x, y in zip(t, times["none"], strict=True)),
            }
            for name, t in times.items()
        ]
    return rows


def main():
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", default="8192,131072")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--rows", type=int, default=0, help="audited per head; 0: the guard's default")
    parser.add_argument("--target", help="of the backend")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    rows = []
    with torch.inference_mode():
        for tokens in map(int, arguments.tokens.split(",")):
            here = measure(tokens, arguments.turns, arguments.target, arguments.rows)
            mhz = clock()
            for row in here:
                row["clock_mhz"] = mhz
                alone = row["guard"].endswith("alone")
                share = 100 * row["more_ms"] / (row["ms"] - row["more_ms"])
                more = "" if alone else f"{row['more_ms']:+8.4f} ms {share:+6.2f} %"
                print(
                    f"{tokens:7d} {row['policy']:28s} {row['density']:.3f} {row['guard']:18s} "
                    f"{row['ms']:9.4f} ms {more} {mhz} MHz",
                    flush=True,
                )
            rows += here
    if arguments.out:
        write_results(arguments.out, rows, target=arguments.target)
    else:
        print(json.dumps(rows[-1]))


if __name__ == "__main__":
    main()

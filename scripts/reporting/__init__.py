"""The report of sweeps and runs: what each pattern cost and what it bought, for those who were not there.

jobs.py        folders -> jobs: manifests, summaries, evaluations, metrics; whatever is missing is said, not guessed
aggregate.py   jobs -> rows: seeds together, each pattern against its dense baseline, Pareto fronts
table.py       rows -> pareto.csv and the table of both pages
words.py       rows -> what was found, in plain sentences (subject.py: what was trained and judged at all)
figures.py     rows -> figures (style.py: their colours, labels.py: names beside points, curves.py: what runs logged)
markdown.py, page.py, write.py, wandb_log.py: report.md, report.html, the folder, and the same for wandb
pictures.py           masks of patterns, loss by position, and recall by depth, of a single run or a comparison
markdown_table.py     Markdown tables, for all of the above
"""

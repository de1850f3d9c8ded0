"""The report of sweeps and runs: quality and cost of each attention pattern.

manifest.py    manifest.json of a sweep, which scripts/sweeping writes
read_jobs.py   folders -> jobs: manifests, summaries, evaluations, metrics, and problems with them
jobs.py        a job's settings, states and numbers
aggregate.py   jobs -> rows: means over seeds, differences to the dense baseline, Pareto fronts
table.py       rows -> pareto.csv and the table of both pages
contexts.py    the loss by context, and the longest useful context
scaling.py     a sweep of several budgets -> each pattern's law of loss and compute (scaling_law.py: the fit and its
               intervals; scaling_text.py: sentences, table and CSV; scaling_figure.py)
findings.py    rows -> findings in sentences (subject.py: the model, the data and the evaluation)
cautions.py    rows -> what these findings do not show
figures.py     rows -> figures (style.py: colours, labels.py: names beside points, curves.py: logged metrics)
content.py     everything that the pages show, gathered once
markdown.py, page.py, write.py, wandb_log.py: report.md, report.html, all files of a report, wandb artifacts
pictures.py           images of a run or a comparison: pattern masks, loss by position, recall by depth
run_table.py          the table at the end of a run and of its evaluation
comparison_tables.py  files of a comparison of runs on the same documents
markdown_table.py     Markdown tables
"""

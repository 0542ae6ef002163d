"""The report of runs: one HTML page with interactive plots, and the same plots as SVG and CSV.

data.py, layers.py, steps.py   from the files of a run to plain values; nothing of the run is executed
charts.py                      from these values to Vega-Lite specifications and their rows
page.py, plots.py              from the charts to the page, and to SVG and CSV
write.py                       `secateur.report`
"""

"""Measurements behind the claims of the README: one command and one file each.

| command                             | file             | what it measures                                                  |
|-------------------------------------|------------------|-------------------------------------------------------------------|
| secateur benchmark search           | agents.py        | agents at equal evaluations                                       |
| secateur benchmark ask              | queries.py       | stored agents under new queries, against fresh searches           |
| secateur benchmark agent            | learner.py       | seconds of the learning agent                                     |
| secateur benchmark importances      | importances.py   | importances, allocated uniformly and by agents                    |
| secateur benchmark recoveries       | recoveries.py    | recoveries of pruned and quantized networks                       |
| secateur benchmark quantizers       | quantizers.py    | ways of rounding                                                  |
| secateur benchmark data-free        | data_free.py     | recoveries without images                                         |
| secateur benchmark prediction       | prediction.py    | scores before fine-tuning against those after it                  |
| secateur benchmark sensitivities    | sensitivities.py | sensitivities of single choices against scores of whole policies  |
| secateur benchmark evaluator        | evaluator.py     | seconds of one evaluation, by part                                |
| secateur benchmark costs            | costs.py         | policies per second of every cost model                           |
| secateur benchmark speed            | speed.py         | latency, file size and memory of pruned and integer networks      |
| secateur benchmark docs             | documentation/   | nothing: it writes tables, references and the picture of README   |
| secateur support                    | support.py       | which torchvision classifiers are supported                       |

cli.py declares the commands and their options. Each file has a function `run_…`, which a command calls. Shared: scaffold.py
(progress, workers, rows and tables), records.py (rows on disk), policies.py, recovery_settings.py and timing.py.
"""

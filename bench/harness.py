"""lm-evaluation-harness itself, on a task of our own with local data: sums with a right and a wrong answer. No network.

    pip install "mlx-lm[evaluate]"
    python bench/harness.py [--items 40] [MODEL …] -o nbs/results/harness.json
"""
import argparse
import json
import os
import random
import sys
import tempfile
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1')

from optiq.evals.harness import harness
from optiq.report import Report

TASK = '''task: local_sums
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
'''

def sums(n):
    "Sums of two numbers, two answers each"
    r = random.Random(0)
    for _ in range(n):
        a, b = r.randrange(2, 40), r.randrange(2, 40)
        options = [a+b, a+b+r.choice([-10, -2, -1, 1, 2, 10])]
        r.shuffle(options)
        yield dict(question=f'{a} + {b} =', choices=list(map(str, options)), answer=options.index(a+b))

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('models', nargs='*', default=['demo'])
    p.add_argument('--items', type=int, default=40)
    p.add_argument('-o', required=True)
    args = p.parse_args()
    from lm_eval.tasks import TaskManager
    with tempfile.TemporaryDirectory() as d:
        os.environ['HF_DATASETS_CACHE'] = f'{d}/cache'
        Path(f'{d}/sums.jsonl').write_text('\n'.join(map(json.dumps, sums(args.items)))+'\n')
        Path(f'{d}/sums.yaml').write_text(TASK.format(file=f'{d}/sums.jsonl'))
        tasks = TaskManager(include_path=d, include_defaults=False)
        reports = [harness(m, 'local_sums', batch=4, task_manager=tasks) for m in args.models]
    for r in reports: r.about['command'] = 'python '+' '.join(sys.argv)
    report = Report.compare(*reports) if len(reports) > 1 else reports[0]
    report.save(args.o)
    print(report)

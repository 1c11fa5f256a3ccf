"""The commands of README and site, run in one process by `python tests/commands.py FOLDER < commands.json`

Every optiq command goes through the real command line, with annotations checked by beartype on the way. Options that a
command does not name have small defaults, so that all of them take about a minute; what it names is as written. All round
the same few tensors and measure on the same text, so what was computed once is remembered.
"""
import gc, json, os, re, shlex, sys, time, warnings
from functools import cache
from pathlib import Path

root = Path(__file__).parents[1]
SMALL = {'convert': dict(n_calibration=1, seq_len=32, n_evaluation=1), 'sweep': dict(n=1, seq_len=32, rounding_n=2),
         'pareto': dict(n_calibration=1, seq_len=32, n_evaluation=1), 'kv-cache': dict(n_calibration=1, seq_len=64, n_evaluation=1),
         'eval': dict(n=2, seq_len=64), 'benchmark': dict(n=2, seq_len=64), 'compare': dict(n_evaluation=1, new_tokens=4)}

@cache
def documents() -> dict: # name ▸ its Markdown
    "The pages of the site and the files beside them"
    pages = {p.relative_to(root).as_posix(): json.loads(p.read_text(encoding='utf-8'))['cells']
             for p in sorted((root/'nbs').rglob('*.ipynb')) if not {'.ipynb_checkpoints', '_proc'} & set(p.parts)}
    text = {n: '\n\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown') for n, cells in pages.items()}
    return text | {p.relative_to(root).as_posix(): p.read_text(encoding='utf-8') for p in (root/'models').rglob('*.md')}

def commands_of(text: str) -> list[str]:
    "The lines of its shell blocks, continued ones joined, comments taken off; of what a shell would source, the command that writes it"
    blocks = re.findall(r'^```(?:sh|bash|shell|console)\n(.*?)^```', text, re.S | re.M)
    lines = re.sub(r'\s*\\\n\s*', ' ', '\n'.join(blocks)).splitlines()
    found = [c for line in lines if (c := re.sub(r'(^|\s+)#.*', '', line).removeprefix('$ ').strip())]
    return [re.sub(r'^eval "\$\((.*)\)"$|^(.*) \| source$', r'\1\2', c) for c in found]

def split(command: str) -> tuple: # environment, words
    words = shlex.split(command)
    n = next((i for i, w in enumerate(words) if not re.fullmatch(r'[A-Z_]+=.*', w)), len(words))
    return dict(w.split('=', 1) for w in words[:n]), words[n:]

def run(command: str, folder: Path) -> dict:
    from click.testing import CliRunner
    from optiq.cli import main
    env, words = split(command)
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    start = time.time()
    r = CliRunner().invoke(main, words[1:], prog_name='optiq', env=env, default_map=SMALL)
    return dict(code=r.exit_code, seconds=round(time.time()-start, 1), output=r.output[-1500:])

if __name__ == '__main__':
    import fast # noqa: F401, before MLX
    from remember import remember_grids, remember_probes, remember_scores
    from beartype import BeartypeConf
    from beartype.claw import beartype_package
    class Wrong(UserWarning): "A value that is not what its annotation says"
    beartype_package('optiq', conf=BeartypeConf(violation_type=Wrong, is_pep484_tower=True))
    found, folder = [], Path(sys.argv[1])
    remember_grids()
    remember_scores()
    remember_probes(folder/'remembered')
    from optiq import job
    job._LEARNED = 2
    gc.freeze() # what was imported is no garbage
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('ignore')
        warnings.simplefilter('always', Wrong)
        for document, command in json.load(sys.stdin):
            found.append(dict(document=document, command=command, **run(command, folder/document)))
    wrong = sorted({str(w.message).split('\n')[0][:400] for w in caught if issubclass(w.category, Wrong)})
    (folder/'found.json').write_text(json.dumps(dict(runs=found, wrong=wrong)))

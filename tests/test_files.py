"Whose file is it? Every command that writes, and every place that is not its own to take"
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from optiq import files
from optiq.cli import main
from optiq.files import added_files, _clear_stale, own_folder, _read_mark, scratch, whole_folder, _write_mark
from optiq.models import Checkpoint
from optiq.material.tiny import tiny

@pytest.fixture(scope='module')
def llama(tmp_path_factory): return tiny('llama', tmp_path_factory.mktemp('llama')/'model')

SMALL = ['--samples', 2, '--seq-len', 16, '--rounding', 'minmax']
CONVERT = ['--n-calibration', 2, '--seq-len', 16, '--n-samples', 2, '--rounding', 'minmax', '--skip-baselines', '--no-verify']
FOLDERS = dict(
    convert=['convert', 'models/a', *CONVERT], with_kv=['convert', 'models/a', '--kv', '--target-size', 1, *CONVERT[:-2]],
    kv_cache=['kv-cache', 'models/a', '--n-samples', 2, '--seq-len', 32, '--eval-samples', 1, '--context', 64],
    pareto=['pareto', 'models/a', *SMALL, '--bits', '4,8', '--targets', '5'], demo=['demo', 'hardware', '--chip', 'M3 Max'])
MADE = dict(convert='model', with_kv='model', kv_cache='kv', pareto='pareto', demo='demo')
FILES = dict(
    sweep=['sweep', 'models/a', *SMALL], gradient=['sweep', 'models/a', '--method', 'gradient', *SMALL],
    screened=['sweep', 'models/a', '--method', 'screened', *SMALL],
    eval=['eval', 'models/a', '--task', 'gsm8k', '--questions', 'word-problems', '--n-samples', 1])

def optiq(*args): return CliRunner().invoke(main, [*map(str, args)], prog_name='optiq')

def tree(folder: Path) -> dict:
    "All that is there: content, kind and targets of links"
    def what(f):
        if f.is_symlink(): return 'link', os.readlink(f)
        return hashlib.sha256(f.read_bytes()).hexdigest() if f.is_file() else 'folder'
    return {str(f.relative_to(folder)): what(f) for f in sorted(folder.rglob('*'))}

@pytest.fixture
def home(llama, tmp_path, monkeypatch):
    "A home folder with a model, a thesis, and a working folder in it"
    home = tmp_path/'home'
    work = home/'work'
    shutil.copytree(llama, work/'models'/'a')
    (home/'letter.txt').write_text('…')
    (work/'thesis').mkdir()
    (work/'thesis'/'thesis.tex').write_text('three years')
    (work/'notes.txt').write_text('no line end')
    (work/'notes.jsonl').write_text('{"a": 1}\n')
    (work/'to-folder').symlink_to('thesis')
    (work/'to-file').symlink_to('notes.txt')
    (work/'to-nothing').symlink_to('nothing')
    monkeypatch.setenv('HOME', str(home))
    monkeypatch.chdir(work)
    return home

def ours(folder: Path, made: str, *more: str):
    "A folder with our mark, and what somebody put there since"
    folder.mkdir(parents=True)
    (folder/'plan.json').write_text('{}')
    _write_mark(folder, made)
    for name in more:
        (folder/name).parent.mkdir(exist_ok=True)
        (folder/name).write_text('mine')

def refused(home, args, *says):
    "One line and exit status 1, and not a byte has changed"
    before, r = tree(home), optiq(*args)
    assert r.exit_code == 1 and r.stderr.startswith('error: ') and r.stderr.count('\n') == 1, (r.stdout, r.stderr)
    assert tree(home) == before
    for s in says: assert s in r.stderr, r.stderr

TAKEN = {'.': 'working', '..': 'home', '../..': 'home', '~': 'home', '~/': 'home', 'thesis': 'thesis.tex', 'thesis/': 'thesis.tex',
         'thesis/..': 'working', 'to-folder': 'link', 'to-nothing': 'link', 'notes.txt': 'not a folder', 'notes.txt/out': 'notes.txt',
         'models': 'source', 'models/a/out': 'source', 'models/a/new/out': 'source', 'strange': 'mine.txt', 'deep': 'sub/mine.txt',
         'other': 'was made as', '/dev/null': 'not a folder', 'x'*250: 'too long',
         'a\nb': 'control character', 'a\udcffb': 'control character', '~nobody-here/out': 'no user'}

@pytest.mark.parametrize('command', FOLDERS)
def test_folders_that_are_not_ours(home, command):
    ours(Path('strange'), MADE[command], 'mine.txt')
    ours(Path('deep'), MADE[command], 'sub/mine.txt')
    ours(Path('other'), 'else')
    takes_model = command != 'demo'
    for place, why in TAKEN.items():
        if 'models' in place and not takes_model: continue
        for flags in ([], ['--overwrite']): refused(home, [*FOLDERS[command], '-o', place, *flags], why if flags else '')
    if command not in ('kv_cache', 'demo'): refused(home, [*FOLDERS[command], '-o', 'models/a', '--overwrite'], 'source')
    ours(Path('mine'), MADE[command])
    refused(home, [*FOLDERS[command], '-o', 'mine'], 'overwrite it')

@pytest.mark.parametrize('command', FILES)
def test_files_that_are_not_ours(home, command):
    Path('plan.json').write_text('{"optiq": "plan"}\n')
    for place in ('notes.txt', 'notes.jsonl', 'notes.txt/x', 'plan.json', 'thesis', 'thesis/', 'to-file', 'to-nothing', '.', '..', '~',
                  '/dev/null', 'models/a/config.json', 'models/a/model.safetensors', 'x'*250, 'a\nb', '~nobody-here/s'):
        refused(home, [*FILES[command], '-o', place])
    for i, plant in enumerate((lambda p: p.symlink_to('notes.txt'), lambda p: p.write_text('mine'), Path.mkdir)):
        plant(Path(f'.{i}.optiq-part')) # where it would be written first
        refused(home, [*FILES[command], '-o', i], 'in the way')

@pytest.mark.parametrize('command', ['convert', 'pareto', 'kv_cache'])
def test_a_sweep_that_is_not_the_runs_journal(home, command):
    "It lies where the journal would be: a run without it is refused, so it can neither be added to nor deleted"
    for text in ('{"optiq": "sweep", "model": "mine"}\n', 'notes', '{"optiq": "sweep", "mod'):
        Path('out.sweep.jsonl').write_text(text)
        refused(home, [*FOLDERS[command], '-o', 'out'], 'out.sweep.jsonl')

def test_only_a_loader_s_own_names(home):
    for command in ('convert', 'with_kv'):
        for name in ('out[1]', 'out*', 'ou?'): refused(home, [*FOLDERS[command], '-o', name], 'as a pattern')

def test_a_file_of_answers_goes_with_tasks_that_write_one(home):
    refused(home, ['eval', 'models/a', '--task', 'perplexity', '-o', 'a.jsonl'], 'perplexity')

def test_a_user_s_sweep_stays(home):
    "It is named like a journal, given, and there after each command that used it"
    assert optiq(*FILES['sweep'], '-o', '~/work/new/s.jsonl', '--bits', '4,8').exit_code == 0 and not Path('~').exists()
    for out in ('out', 'curve'): shutil.copy('new/s.jsonl', f'{out}.sweep.jsonl')
    kept = Path('out.sweep.jsonl').read_bytes()
    Path('out').mkdir() # an empty folder is as good as none
    r = optiq(*FOLDERS['convert'], '--sweep', 'out.sweep.jsonl', '-o', 'out/')
    assert r.exit_code == 0, r.output
    r = optiq('pareto', 'curve.sweep.jsonl', '--targets', 5, '-o', 'curve')
    assert r.exit_code == 0, r.output
    assert all(Path(f'{out}.sweep.jsonl').read_bytes() == kept for out in ('out', 'curve'))
    r = optiq(*FOLDERS['convert'], '--sweep', 'out/optiq/sweep.json', '-o', '~/work/out', '--overwrite')
    assert r.exit_code == 0 and Checkpoint('out').units, r.output
    assert not [n for n in tree(home) if 'optiq-' in n]

def test_kv_cache_adds_beside_the_weights(home):
    model = Path('models/a')
    before = tree(model)
    run = [*FOLDERS['kv_cache'], '-o']
    assert optiq(*run, 'models/a/').exit_code == 0
    after = tree(model)
    assert before.items() <= after.items() and {'kv_config.json', 'optiq', 'optiq/kv', files._MARK, 'optiq/kv/plan.json'} <= {*after}
    assert all(n.split('/')[0] in ('kv_config.json', 'optiq', files._MARK) for n in after.keys()-before.keys())
    refused(home, [*run, 'models/a'], 'overwrite it')
    r = optiq(*run, 'models/a', '--overwrite', '--context', 128)
    assert r.exit_code == 0 and {*tree(model)} == {*after} and json.loads((model/'kv_config.json').read_text())['context'] == 128
    (model/'optiq'/'kv'/'mine.txt').write_text('mine')
    refused(home, [*run, 'models/a', '--overwrite'], 'mine.txt')
    refused(home, [*FOLDERS['pareto'], '-o', 'models/a', '--overwrite'])
    shutil.rmtree(model/'optiq')
    (model/files._MARK).unlink()
    refused(home, [*run, 'models/a', '--overwrite'], 'kv_config.json')
    (model/'kv_config.json').unlink()
    (model/'optiq').symlink_to(home/'work'/'thesis')
    refused(home, [*run, 'models/a', '--overwrite'], 'optiq')

@pytest.mark.parametrize('command', ['pareto', 'kv_cache'])
def test_without_matplotlib_there_are_the_tables(home, monkeypatch, command):
    for name in ('matplotlib', 'matplotlib.pyplot', 'matplotlib.figure', 'seaborn', 'pandas'): monkeypatch.setitem(sys.modules, name, None)
    r = optiq(*FOLDERS[command], '-o', 'out')
    assert r.exit_code == 0 and "pip install 'optiq-mlx[lab]'" in r.stderr, r.output
    names = {*tree(Path('out'))}
    assert not any(n.endswith(('png', 'svg')) for n in names) and {'pareto.json', 'kv_config.json'} & names
    assert tree(Path('.')).keys() >= {'out'} and not Path('out.sweep.jsonl').exists()

def test_a_demo_without_matplotlib(home, monkeypatch, capsys):
    from optiq.show.demo import Demo
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    Demo('llm', [], dict(figure=lambda: 1/0), {}).save('d')
    assert {*tree(Path('d'))} == {'.optiq', 'tables.txt', 'demo.json'} and 'optiq-mlx[lab]' in capsys.readouterr().err
    with pytest.raises(FileExistsError): Demo('llm', [], {}, {}).save('d')
    Demo('llm', [], {}, {}).save('d', overwrite=True)
    ours(Path('e/model'), 'model') # `make demo` writes its models there first
    Demo('llm', [], {}, {}).save('e')
    assert {*tree(Path('e'))} > {'model/plan.json', 'demo.json', '.optiq'}
    Path('thesis/tables.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='tables.txt'): Demo('llm', [], {}, {}).save('thesis', overwrite=True)

KILLED = '''
import os, signal, sys
from pathlib import Path
for name in ('SIGTERM', 'SIGHUP'): signal.signal(getattr(signal, name), signal.SIG_DFL) # nohup and CI ignore some
signal.signal(signal.SIGINT, signal.default_int_handler)
from optiq import files
rename, left = Path.rename, [int(sys.argv[1])]
def slow(self, *a):
    left[0] -= 1
    if left[0] == -1: os.kill(os.getpid(), getattr(signal, sys.argv[2]))
    return rename(self, *a)
Path.rename = slow
from optiq.command import _stoppable
with _stoppable(), files.whole_folder('out', overwrite=True) as part: (part/'plan.json').write_text('new')
'''

@pytest.mark.parametrize('signal', ['SIGKILL', 'SIGTERM', 'SIGINT', 'SIGHUP'])
@pytest.mark.parametrize('renames', range(3))
def test_killed_between_two_renames(tmp_path, monkeypatch, renames, signal):
    "The old folder or the new one is there, at the latest when the next run looks; nothing else is left"
    monkeypatch.chdir(tmp_path)
    ours(Path('out'), 'model')
    r = subprocess.run([sys.executable, '-c', KILLED, str(renames), signal], capture_output=True, text=True)
    assert r.returncode != 0
    if signal == 'SIGKILL': own_folder('out', overwrite=True)
    assert {f.name for f in tmp_path.iterdir()} == {'out'}
    finished = renames == 2 or signal != 'SIGKILL' # a signal that can wait does
    assert Path('out/plan.json').read_text() == ('new' if finished else '{}') and _read_mark(Path('out'))['files'] == ['plan.json']

def test_what_is_stale_is_cleared_and_what_lives_is_not(tmp_path):
    out = tmp_path/'out'
    with scratch(out) as mine:
        _clear_stale(out)
        assert mine.is_dir()
    for name in ('.out-abcdefgh.optiq-part', '.out-x-abcdefgh.optiq-part', '.out-abcdefgi.optiq-part'):
        (tmp_path/name).mkdir()
        (tmp_path/name/'half').write_text('…')
    _write_mark(tmp_path/'.out-abcdefgh.optiq-part', 'part', [])
    _write_mark(tmp_path/'.out-x-abcdefgh.optiq-part', 'part', [])
    (tmp_path/'.out-abcdefgj.optiq-part').mkdir() # killed before it was marked
    _clear_stale(out)
    assert {f.name for f in tmp_path.iterdir()} == {'.out-x-abcdefgh.optiq-part', '.out-abcdefgi.optiq-part'}

def test_what_was_made_meanwhile_stays(tmp_path):
    for overwrite in (False, True):
        out = tmp_path/f'{overwrite}'
        with pytest.raises(FileExistsError, match='thesis'), whole_folder(out, overwrite) as part:
            (part/'plan.json').write_text('{}')
            out.mkdir()
            (out/'thesis').write_text('…')
        assert [f.name for f in out.iterdir()] == ['thesis']
    assert {f.name for f in tmp_path.iterdir()} == {'False', 'True'}

def test_added_files_of_before_are_replaced(tmp_path):
    for names, flag in ((('a', 'd/b'), False), (('a', 'd/c'), True)):
        with added_files(tmp_path, 'a', 'd', overwrite=flag) as part:
            (part/'d').mkdir()
            for n in names: (part/n).write_text(n)
    assert _read_mark(tmp_path)['files'] == ['a', 'd/c'] and {*tree(tmp_path)} == {'.optiq', 'a', 'd', 'd/c'}

@pytest.mark.parametrize('names', [['d/../../mine'], ['d/../a'], [1, {}], ['d'], '[', 'folder'])
def test_marks_that_lie(tmp_path, names):
    "A checkpoint may come with one: what it names outside of the added folder stays, and it never stops the end of a run"
    (folder := tmp_path/'m').mkdir()
    for f in (tmp_path/'mine', folder/'a'): f.write_text('mine')
    if names == 'folder': (folder/files._MARK).mkdir()
    else: (folder/files._MARK).write_text('['*100000 if names == '[' else json.dumps(dict(optiq='folder', made='model', files=names)))
    if names == ['d']: (folder/'d').write_text('mine')
    else: (folder/'d'/'e').mkdir(parents=True)
    before = tree(tmp_path)
    if names in (['d'], 'folder'):
        with pytest.raises(FileExistsError), added_files(folder, 'k', 'd/e'): raise AssertionError('too late')
        assert tree(tmp_path) == before
    else:
        with added_files(folder, 'k', 'd') as part: (part/'k').write_text('k')
        assert before.items()-{(f'm/{files._MARK}', before[f'm/{files._MARK}'])} <= tree(tmp_path).items()

def test_a_full_disk_is_told_before_the_work(home, monkeypatch):
    usage = shutil.disk_usage('.')
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: usage._replace(free=1000))
    refused(home, [*FOLDERS['convert'], '-o', 'out'], 'are needed')

@pytest.mark.parametrize('e', [OSError(28, 'No space left on device'), RuntimeError('[write] Unable to write 14505 bytes to file.')])
def test_a_disk_that_fills_up_is_told_with_the_place(tmp_path, e):
    with pytest.raises(OSError, match='out cannot be written whole.*make some'), whole_folder(tmp_path/'out'): raise e
    assert not [*tmp_path.iterdir()]

def test_advice_after_an_interruption(home, monkeypatch):
    import optiq.job as job
    import optiq.sensitivity as sensitivity
    def stop(*a, **k): raise KeyboardInterrupt
    for where in (job, sensitivity): monkeypatch.setattr(where, 'kl_sweep', stop)
    def said(*args):
        r = optiq(*args)
        assert r.exit_code == 130
        return r.stderr
    assert 'resume where it stopped' in said(*FILES['sweep'], '-o', 's') and 'resume where it stopped' in said(*FOLDERS['convert'], '-o', 'o')
    assert '--resume in place of --no-resume' in said(*FILES['sweep'], '-o', 's', '--no-resume')
    assert 'go on' not in said(*FILES['gradient'], '-o', 's') and 'go on' not in said(*FOLDERS['pareto'])

# One output has one writer

WRITERS = {'convert': ['convert', 'demo'], 'pareto': ['pareto', 'demo'], 'kv-cache': ['kv-cache', 'demo'], 'sweep': ['sweep', 'demo'],
           'eval': ['eval', 'demo', '--task', 'gsm8k', '--questions', 'word-problems', '--n-samples', 1]}

def test_claims_leave_no_folder(tmp_path):
    "Four processes that claim and give up at once; nobody trips over a folder that another one took away"
    code = ("from optiq.files import _claim\nimport sys\nfor i in range(200):\n    with _claim(f'{sys.argv[1]}{i % 3}'): pass")
    env = os.environ | dict(TMPDIR=str(tmp_path))
    many = [subprocess.Popen([sys.executable, '-c', code, f'out{k}-'], cwd=tmp_path, env=env) for k in range(4)]
    assert [p.wait() for p in many] == [0]*4 and not [*tmp_path.iterdir()]

@pytest.mark.parametrize('command', WRITERS)
def test_what_another_process_writes_is_refused_at_once(home, command):
    holder = "import sys; from optiq.files import _claim\nwith _claim(sys.argv[1]): print('claimed', flush=True); sys.stdin.read()"
    p = subprocess.Popen([sys.executable, '-c', holder, 'out'], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert p.stdout.readline() == 'claimed\n'
        refused(home, [*WRITERS[command], '-o', Path('nowhere', '..', 'out')], f'is being written by another process (pid {p.pid})')
    finally: p.kill(), p.wait()
    with files._claim('out'): pass # a process that was killed holds nothing
    assert not files._lock_of(Path('out')).exists()

"A run that was disturbed, at any moment and on any number of ranks, ends with the file of one that was left alone"
import json
import threading
from contextlib import nullcontext
from zlib import crc32

import numpy as np
import pytest

import optiq.evals.gsm8k as G
import optiq.files as files
import optiq.measure.log as S
import optiq.sensitivity as sensitivity
from optiq.backends.torch import TorchBackend
from optiq.files import own_file
from optiq.formats import AS_IS
from optiq.models import Checkpoint
from optiq.material.tiny import tiny

@pytest.fixture(scope='module')
def b(tmp_path_factory): return TorchBackend(Checkpoint(tiny('llama', tmp_path_factory.mktemp('llama')/'m'), model_type='llm'))

@pytest.fixture(autouse=True)
def quick(monkeypatch):
    "Passes of five probes and one sequence, and values that depend on both, without any computing"
    def value(u, f, row): return crc32(f'{u.path} {f} {row.tolist()}'.encode())/2**32
    def scale(f): return 1e-7 if f == AS_IS else 1 # a weight left as it is changes nearly nothing
    def measure(b, batch, todo, *args, **more): return np.array([[value(u, f, row)*scale(f) for row in batch] for u, f in todo])
    monkeypatch.setattr(S, 'plan_passes', lambda *a: (1, 5))
    for name in ('optiq.sensitivity', 'optiq.measure.estimate'): monkeypatch.setattr(f'{name}.measure', measure)

def sweep(b, out, **options):
    tokens = np.random.default_rng(0).integers(0, b.checkpoint.vocabulary, (3, 16)).astype(np.int32)
    return sensitivity.kl_sweep(b, tokens, [4, 8], out=out, progress=False, **dict(rounding='minmax')|options)

class Killed(BaseException): "As far as one process can be killed among threads"

class ThreadRanks(S._Ranks):
    "Ranks that are threads of this process"
    def __init__(self, rank, size, barrier, parts):
        self.rank, self.size, self.barrier, self.parts = rank, size, barrier, parts
    def sum(self, a):
        self.parts[self.rank] = a
        self.barrier.wait(60)
        total = sum(self.parts[r] for r in range(self.size))
        self.barrier.wait(60)
        return total

def together(monkeypatch, b, out, size, after=None):
    "A sweep on so many ranks; all die when one has measured so many passes"
    here, barrier, parts = threading.local(), threading.Barrier(size), {}
    real, failed = S.SweepLog.add, []
    def add(self, *args):
        real(self, *args)
        here.done = getattr(here, 'done', 0)+1
        if after is not None and here.done > after+here.ranks.rank: raise Killed
    def run(rank):
        here.ranks = ThreadRanks(rank, size, barrier, parts)
        try: sweep(b, out)
        except BaseException as e:
            failed.append(e)
            barrier.abort()
    with monkeypatch.context() as m:
        m.setattr(S, '_ranks_here', lambda: here.ranks)
        m.setattr(S.SweepLog, 'add', add)
        m.setattr(files, '_claim', nullcontext) # ranks know each other by their environment, which threads share
        threads = [threading.Thread(target=run, args=(r,)) for r in range(size)]
        for t in threads: t.start()
        for t in threads: t.join()
    return failed

@pytest.mark.parametrize('runs', [ # ranks and passes after which they die, one run after the other
    [(2, 1), (3, None)], [(3, 0), (2, 1), (4, None)], [(2, 1), (1, 2), (1, None)], [(1, 2), (3, None)], [(4, 0), (3, 0), (2, 0), (1, None)]])
def test_any_number_of_ranks_gives_the_file_of_one(b, tmp_path, monkeypatch, runs):
    want, out = tmp_path/'one.jsonl', tmp_path/'s.jsonl'
    sweep(b, want)
    for size, after in runs:
        failed = together(monkeypatch, b, out, size, after)
        assert bool(failed) == (after is not None), failed
        assert all(isinstance(e, (Killed, threading.BrokenBarrierError)) for e in failed), failed
    assert out.read_bytes() == want.read_bytes()
    assert {f.name for f in tmp_path.iterdir()} == {'one.jsonl', 's.jsonl'}

def test_ranks_with_disks_of_their_own(b, tmp_path, monkeypatch):
    "Two machines measured half each; on one disk again, or with one file lost, nothing counts twice"
    want, out = tmp_path/'one.jsonl', tmp_path/'s.jsonl'
    sweep(b, want)
    lines = want.read_text().splitlines(True)
    for rank, part in enumerate((lines[1:21], lines[11:31])): # with ten lines in common
        (tmp_path/f's.jsonl.rank{rank}').write_text(lines[0]+''.join(part))
    assert not together(monkeypatch, b, out, 2)
    assert out.read_bytes() == want.read_bytes() and len([*tmp_path.iterdir()]) == 2

def test_other_free_memory_changes_nothing(b, tmp_path, monkeypatch):
    want, out = tmp_path/'one.jsonl', tmp_path/'s.jsonl'
    sweep(b, want)
    out.write_bytes(want.read_bytes()[:len(want.read_bytes())//2])
    monkeypatch.setattr(S, 'plan_passes', lambda *a: (3, 24))
    sweep(b, out)
    assert out.read_bytes() == want.read_bytes()

def test_a_sweep_cut_at_any_byte_ends_equal(b, tmp_path):
    want, out = tmp_path/'one.jsonl', tmp_path/'s.jsonl'
    sweep(b, want)
    data = want.read_bytes()
    ends = [i+k for i, c in enumerate(data) if c == 10 for k in (0, 1, 2)][:40]
    for n in {0, 1, 8, 17, *ends, *range(0, len(data), len(data)//40), len(data)-1}:
        out.write_bytes(data[:n])
        sweep(b, out)
        assert out.read_bytes() == data, n
    assert {f.name for f in tmp_path.iterdir()} == {'one.jsonl', 's.jsonl'}

def test_an_end_that_came_early_comes_again(b, tmp_path, monkeypatch):
    "A run that ends when plans no longer change, killed right before it would have ended"
    monkeypatch.setattr(sensitivity, '_settled', lambda log, targets: len(log.records) >= 25)
    out = tmp_path/'s.jsonl'
    for _ in range(2):
        with pytest.raises(ValueError): sweep(b, out, until='stable', targets=[5]) # half a sequence, so no sweep
        lengths = out.read_text().count('\n')
        assert lengths == 26

def test_a_deleted_sweep_is_an_error(b, tmp_path, monkeypatch):
    for at in (2, None): # while it is written, and after the last line
        out, real, calls = tmp_path/f'{at}.jsonl', S.SweepLog.add, []
        def add(self, *args, real=real):
            real(self, *args)
            calls.append(1)
            if len(calls) == at or at is None and not self.missing(): self.path.unlink()
        with monkeypatch.context() as m:
            m.setattr(S.SweepLog, 'add', add)
            with pytest.raises(FileNotFoundError, match='deleted while'): sweep(b, out)
        assert not out.exists()

def test_a_file_that_tells_values_twice_is_refused(b, tmp_path):
    out = tmp_path/'s.jsonl'
    sweep(b, out)
    lines = [json.loads(x) for x in out.read_text().splitlines()]
    out.write_text(''.join(json.dumps(x | dict(kl=x['kl']*2) if x.get('start') == 0 else x)+'\n' for x in lines))
    with pytest.raises(ValueError, match='not finished'): S.Sweep.load(out)

ROWS = [dict(question=f'{i} and {i}?', answer=str(2*i)) for i in range(21)]

def ask(monkeypatch, b, out):
    "Answers that depend on all that is asked at once, as padding does"
    def compose(b, prompts, *args): return [f'{len(prompts)} {prompts[0][:20]!r} ✓' for p in prompts]
    monkeypatch.setattr(G, 'compose', compose)
    return G.gsm8k(b, ROWS, shots=0, batch=8, out=out)

def test_answers_cut_at_any_byte_end_equal(b, tmp_path, monkeypatch):
    want, out = tmp_path/'whole.jsonl', tmp_path/'a.jsonl'
    report = ask(monkeypatch, b, want)
    data = want.read_bytes()
    for n in {0, 1, 20, *range(0, len(data), len(data)//60), len(data)-1, len(data)}:
        out.write_bytes(data[:n])
        assert ask(monkeypatch, b, out).rows == report.rows
        assert out.read_bytes() == data, n

def test_deleted_answers_are_an_error(b, tmp_path, monkeypatch):
    out, real = tmp_path/'a.jsonl', G.Answers.add
    def add(self, records):
        real(self, records)
        out.unlink()
    monkeypatch.setattr(G.Answers, 'add', add)
    with pytest.raises(FileNotFoundError, match='deleted while'): ask(monkeypatch, b, out)
    assert not out.exists()

def test_a_file_that_was_begun_is_known(tmp_path):
    for text in ('', '{"opt', '{"optiq": "sweep"', '{"optiq": "sweep", "model": "x"'):
        (tmp_path/'s').write_text(text)
        assert own_file(tmp_path/'s', 'sweep') == tmp_path/'s'
    for text in ('x', '{"opt\n', '{"optiq": "plan"', '{"optiq": "sweeper"'):
        (tmp_path/'s').write_text(text)
        with pytest.raises(FileExistsError): own_file(tmp_path/'s', 'sweep')

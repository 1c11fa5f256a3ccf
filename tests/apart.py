"""Processes of their own, each forked from one that has imported what takes seconds, and nothing of ours

A test needs one where it kills it, where it must not know of optiq, or where it says what a command leaves behind.
"""
import gc
import multiprocessing
import os
import runpy
import sys
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace

forked = multiprocessing.get_context('forkserver')
forked.set_forkserver_preload(['fast', 'torch', 'transformers.models.llama.modeling_llama', 'mlx_lm.models.llama', 'scipy.optimize'])

def _become(what: list, cwd: str, env: dict, out: int, err: int): # in the child
    for name in {*os.environ}-{*env}: del os.environ[name]
    os.environ.update(env)
    os.chdir(cwd)
    gc.freeze() # what was imported is no garbage
    for file, number, name in ((out, 1, 'stdout'), (err, 2, 'stderr')):
        os.dup2(os.open(file, os.O_WRONLY), number)
        setattr(sys, name, open(number, 'w', buffering=1, closefd=False))
    kind, code, *sys.argv[1:] = what
    if kind == '-m':
        sys.argv[0] = code
        runpy.run_module(code, run_name='__main__', alter_sys=True)
    else: exec(code, {'__name__': '__main__'})

class Apart:
    "As `subprocess.Popen([sys.executable, '-m', module, …])` or `[sys.executable, '-c', code, …]`, in less time"
    def __init__(self, *what, cwd=None, env=None):
        self.said = [str(Path(mkdtemp(prefix='apart-'))/name) for name in ('out', 'err')]
        for f in self.said: Path(f).touch()
        args = [*map(str, what)], str(cwd or os.getcwd()), dict(os.environ if env is None else env), *self.said
        self.process = forked.Process(target=_become, args=args)
        self.process.start()
        self.pid, self.terminate, self.kill = self.process.pid, self.process.terminate, self.process.kill
    def poll(self): return self.process.exitcode
    def wait(self, seconds=None):
        self.process.join(seconds)
        if self.poll() is None: raise TimeoutError(f'process {self.pid} runs after {seconds} seconds')
        return self.poll()
    def read(self, k): return Path(self.said[k]).read_text()
    @property
    def stdout(self): return self.read(0)
    @property
    def stderr(self): return self.read(1)

def run(*what, **how): # ▸ as `subprocess.run` gives it
    p = Apart(*what, **how)
    p.wait()
    return SimpleNamespace(returncode=p.poll(), stdout=p.stdout, stderr=p.stderr)

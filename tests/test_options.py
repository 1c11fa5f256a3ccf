"""Every option of every command is done or refused by its name; none is ignored

A command is run twice, with an option and without. What arrives at the seams of the road is written down by spies, and
nothing is measured. If both runs are the same, nobody took notice of the option.
"""
import ast
import functools
import inspect
import re
from dataclasses import asdict
from importlib import import_module
from types import SimpleNamespace

import click
import numpy as np
import pytest
from click.testing import CliRunner

import optiq.cli as cli
from optiq import options
from optiq.commands import look, make
import optiq.command as command_of
from optiq import latency, models, pipeline, score, sensitivity, serve
from optiq.evals import throughput, verify
from optiq.formats import parse_format
from optiq.measure.sweep import Sweep
from optiq.models import Checkpoint
from optiq.report import Report
from optiq.show import demos, doctor

KV = ['convert', 'demo', '--kv', '--target-size', '20']
BASES = dict(
    convert=['convert', 'demo'], convert_sweep=['convert', 'demo', '--sweep', 's.json'], dry=['convert', 'demo', '--dry-run'], kv=KV,
    kv_sweep=[*KV, '--sweep', 's.json'], kv_cache=['kv-cache', 'demo'], pareto=['pareto', 'demo'],
    pareto_verify=['pareto', 'demo', '--verify', '1'],
    pareto_sweep=['pareto', 's.json'], pareto_file=['pareto', 'demo', '--sweep', 's.json', '--verify', '1'],
    pareto_out=['pareto', 'demo', '-o', 'curve'], sweep=['sweep', 'demo', '-o', 'there'],
    sweep_minmax=['sweep', 'demo', '-o', 'there', '--rounding', 'minmax'],
    screened=['sweep', 'demo', '-o', 'there', '--method', 'screened'], stable=['sweep', 'demo', '-o', 'there', '--until-stable'],
    latency=['latency', 'demo'], benchmark=['benchmark', 'demo', '--no-speed'], speed=['benchmark', 'demo', '--speed'],
    verify=['verify', 'demo'], reference=['verify', 'demo', '--reference', 'demo'], demo=['demo'], demo_llm=['demo', 'llm'],
    demo_hardware=['demo', 'hardware'], serve=['serve', 'demo'], doctor=['doctor'],
    responses=['eval', '--task', 'gsm8k', '--responses', 'there'],
    **{t: ['eval', 'demo', '--task', t] for t in ('perplexity', 'kl', 'gsm8k', 'needle', 'recall', 'ai2d', 'wer', 'harness:x')})
VALUES = {'--dtype': 'float16', '--target': None,
          '--formats': '4g32,8g64', '--candidate-bits': '3,4', '--bits': '3,4', '--kv-candidate-bits': '3',
          '--group-size': '32', '--protect': 'embed', '--tie': 'qkv', '--rounding': 'gptq', '--backend': 'mlx',
          '--model-type': 'llm', '--sweep': 's.json', '--chip': 'M3 Max',
          '--targets': '4,5', '--profiles': 'all', '--kv': '4', '--task': None, '--method': 'gradient', '--questions': 'word-problems',
          '--output': 'elsewhere'}

def made_up(c) -> Sweep:
    fmts = [parse_format(f) for f in ('3g64', '4g64', '8g64', '4g32', '3g32', '8g32')]
    values = {(u.path, f): np.full(8, np.exp(-f.bits)) for u in c.units for f in fmts}
    return Sweep(c.units, fmts, values, dict(optiq='sweep', model='demo', params=c.params, other_bytes=c.other_bytes,
                                             units=[asdict(u) for u in c.units],
        fingerprint=dict(model=c.fingerprint, tokens='made up', quantizer='search', backend='torch', device='cpu',
                         formats=[str(f) for f in fmts])))

class Anything(SimpleNamespace):
    "A result that can be shown"
    about, rows = {}, ()
    def __repr__(self): return 'anything'
    def __call__(self, *a): return {}

@pytest.fixture(scope='module')
def demo(): return Checkpoint('demo')

@pytest.fixture(scope='module')
def sweep(demo): return made_up(demo)

@pytest.fixture(scope='module')
def saved(sweep, tmp_path_factory):
    file = tmp_path_factory.mktemp('sweep')/'s.json'
    sweep.save(file)
    return file.read_bytes()

@pytest.fixture
def optiq(monkeypatch, tmp_path, sweep, saved, demo):
    "Runs a command line and tells its exit status, what it printed, and what arrived where the work begins"
    monkeypatch.chdir(tmp_path)
    (tmp_path/'s.json').write_bytes(saved)
    (tmp_path/'there').write_text('{"optiq": "responses"}\n')
    seen = []
    def spy(where, name, gives=lambda *a, **k: Anything(points=list, versus=list, figures=dict, ok=True, rows=[], about={}, mean_error=0)):
        real = getattr(where, name)
        def fake(*a, **k):
            seen.append((name, repr(a), repr(sorted(k.items()))))
            return gives(*a, **k)
        monkeypatch.setattr(where, name, functools.wraps(real)(fake) if callable(real) and not isinstance(real, type) else fake)
    rows = [dict(name=n, size_mb=1, true_bpw=4, kl=0, agreement=1) for n in ('optiq', 'reference')]
    monkeypatch.setattr('optiq.commands.make._next_steps', lambda *a: '')
    report = Anything(rows=rows, about=dict(evaluation='text, 1 × 2 tokens, 0f'))
    found = dict(figures=dict(memory=[], model_type='llm'), report=report, plan='', verified=None, config=dict(layers=[]), weights='', cache='')
    for name in ('_choose_weights', '_choose_cache', '_choose_both'): spy(pipeline, name, lambda job: found)
    for where in (pipeline, models, score): spy(where, 'Checkpoint', lambda name, *a: demo)
    spy(pipeline._Job, 'open', lambda job, more: (None, SimpleNamespace(scored=None, about={})))
    for name in ('_find_sweep', '_narrowed'): spy(pipeline, name, lambda *a, **k: sweep)
    for name in ('pareto', 'measured', '_save_curve', 'compare', '_quantizer_of_plans'): spy(pipeline, name)
    spy(sensitivity, 'kl_sweep', lambda *a, **k: sweep)
    spy(latency, 'predict_speeds', lambda *a, **k: Anything(rows=[], mean_error=0, about=dict(chip='', source='', context=1, point='')))
    for where, name in ((throughput, 'throughput'), (verify, 'verify'), (serve, 'serve'), (look, '_with_speeds')): spy(where, name)
    spy(doctor, 'doctor', lambda *a: type('Found', (list,), dict(figures=dict, ok=True))())
    tasks, real_demo = score._find_task, demos.find_demo
    def task(name): return functools.wraps(tasks(name))(lambda *a, **k: seen.append(('task', repr(a), repr(sorted(k.items())))) or Anything())
    def demo_of(name):
        real = real_demo(name)
        def run(*a, **k):
            seen.append((name, repr(a), repr(sorted(k.items()))))
            return Anything(save=lambda *a: seen.append(('saved', repr(a))), results=dict)
        return functools.wraps(real)(run)
    monkeypatch.setattr(score, '_find_task', task)
    monkeypatch.setattr(demos, 'find_demo', demo_of)
    monkeypatch.setattr(score, 'as_figures', lambda *a: {})
    monkeypatch.setattr('optiq.evals.gsm8k.score_responses', lambda *a: Anything())
    monkeypatch.setattr(Report, 'compare', staticmethod(lambda *a: Anything()))
    def run(*words):
        seen.clear()
        r = CliRunner().invoke(cli.main, [*map(str, words)], prog_name='optiq')
        assert r.exception is None or isinstance(r.exception, SystemExit), r.exception
        return r.exit_code, r.output, [re.sub(r'0x\w+', '', repr(s)) for s in seen]
    return run

def cases() -> list:
    found = []
    for name, base in BASES.items():
        for p in cli.main.commands[base[0]].params:
            if not isinstance(p, click.Option) or {*p.opts, *p.secondary_opts} & {*base}: continue
            for option in [*p.opts[-1:]*(p.default is not True), *p.secondary_opts]: # not what is so anyway
                value = VALUES.get(option, 'there' if isinstance(p.type, command_of._Filled) else '7')
                alone = p.is_flag or p.flag_value == 'stable'
                if value is not None or alone: found.append(pytest.param(name, option, [option]+[value]*(not alone), id=f'{name} {option}'))
    return found

@pytest.fixture(scope='module')
def known(): return {}

def called(name, option) -> list: # all that an option is called
    return next([*p.opts, *p.secondary_opts] for p in cli.main.commands[BASES[name][0]].params if option in p.opts+p.secondary_opts)

@pytest.mark.parametrize('name, option, words', cases())
def test_an_option_is_done_or_refused(optiq, known, name, option, words):
    code, said, plain = known[name] = known.get(name) or optiq(*BASES[name])
    assert code == 0 and (plain or name in ('doctor', 'demo', 'responses')), said
    code, more, now = optiq(*BASES[name], *words)
    if (name, option) == ('dry', '--output'): return # it is judged, see below
    if code: assert any(n in more for n in called(name, option)) and more.count('\n') <= 4, more
    else: assert (more, now) != (said, plain), f'{option} was ignored'

REFUSED = {'--target-bpw', '--target-memory', '--target-tps', '--chip', '--polish', '--verify', '--skip-baselines',
           '--method', '--time-budget', '--draft-format'}

def test_weights_and_cache_together_refuse_no_more_than_they_say(optiq):
    found = {option for name, option, words in (c.values for c in cases()) if name == 'kv' and optiq(*KV, *words)[0]}
    assert found == REFUSED

def test_what_arrives_with_a_cache(optiq):
    code, said, seen = optiq(*KV, '--rounding', 'gptq', '--protect', 'embed', '--tie', 'qkv', '--sweep', 's.json', '--kv-candidate-bits', 'tq3',
        '--seq-len', 64, '--n-calibration', 8, '--context', 512, '-o', 'both', '--rounding-samples', 9, '--formats', '3g64,8g64')
    assert code == 0, said
    job = next(s for s in seen if s.startswith("('_choose_both'"))
    for part in ("rounding='gptq'", "protect=('embed',)", "tie=('qkv',)", "sweep='s.json'", 'tq3', 'seq_len=64', 'n_calibration=8',
                 'context=512', "Path('both')",
                 'rounding_n=9', '3g64', 'max_bytes=20971520', 'eval_len=64'): assert part in job, (part, job)
    r = optiq(*KV, '--rounding', 'gptq', '--polish', 'dwq', '--protect', 'embed', '--tie', 'qkv', '--sweep', '/no/such/file')
    assert r[0] == 1 and '--polish' in r[1]

def test_the_defaults_of_the_command_are_those_of_python(optiq):
    for words, how in ((['convert', 'demo'], {}), (KV, dict(caps=pipeline.Caps(max_bytes=20*2**20), cache=pipeline.Cache())),
                       (['kv-cache', 'demo'], dict(weights=None, cache=pipeline.Cache()))):
        asked = []
        for run in (lambda: optiq(*words), lambda: pipeline.optimize('demo', **how)):
            with pytest.MonkeyPatch.context() as m:
                for name in ('_choose_weights', '_choose_cache', '_choose_both'): m.setattr(pipeline, name, lambda job: asked.append(job) or 1/0)
                try: run()
                except (AssertionError, ZeroDivisionError): pass
        mine, other = asked
        assert mine.texts == other.texts and mine.backend == other.backend and mine.overwrite == other.overwrite
        assert (mine.caps.context or 16384) == (other.caps.context or 16384) and mine.caps.max_bytes == other.caps.max_bytes
        assert mine.caps.target_bpw == other.caps.target_bpw
        if mine.weights: assert mine.formats == other.formats and mine.more == other.more and mine.rounding == other.rounding
        if mine.cache: assert mine.kv_formats == other.kv_formats and mine.cache.tie == other.cache.tie

def test_a_dry_run_judges_its_output(optiq, tmp_path):
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'thesis.tex').write_text('three years')
    assert optiq('convert', 'demo', '--dry-run', '-o', 'new')[0] == 0
    code, said, seen = optiq('convert', 'demo', '--dry-run', '-o', 'mine', '--overwrite')
    assert code == 1 and 'thesis.tex' in said and not seen

# Errors name the option

@pytest.mark.parametrize('words, name', [
    (['convert', 'demo', '--target-tps', '1e9', '--chip', 'M3 Max'], '--target-tps'),
    (['convert', 'demo', '--target-tps', '1e-320', '--chip', 'M3 Max'], '--target-tps'),
    (['convert', 'demo', '--target-bpw', '2'], '--target-bpw'), (['convert', 'demo', '--target-size', '1'], '--target-size'),
    (['convert', 'demo', '--target-memory', '1', '--context', '512'], '--target-memory'),
    (['kv-cache', 'demo', '--target-bits', '2'], '--target-bits'),
    (['convert', 'demo', '--protect', 'nobody'], '--protect'), (['convert', 'demo', '--tie', 'nobody'], '--tie'),
    (['convert', 'demo', '--sweep', '.'], '--sweep'), (['convert', 'demo', '--formats', '9g64'], '--formats'),
    (['convert', 'demo', '--chip', 'Z80', '--target-tps', '9'], '--chip'),
    (['pareto', 's.json', '--targets', '1e-320'], '--targets'), (['pareto', 's.json', '--targets', '60'], '--targets'),
    (['pareto', 's.json', '--profiles', 'none'], '--profiles'),
    (['pareto', 'demo', '--verify', '9'*24], '--verify'), (['pareto', 'demo', '--verify', '-1'], '--verify'),
    (['sweep', 'demo', '-o', 's', '--targets', 'x', '--until-stable'], '--targets'),
    (['pareto', 's.json', '--sweep', 's.json'], '--sweep'), (['pareto', 's.json', '--calibration', 'x'], '--calibration'),
    (['convert', 'demo', '--calibration', 'nowhere.txt'], '--calibration')])
def test_an_error_names_the_option(tmp_path, monkeypatch, sweep, words, name):
    monkeypatch.chdir(tmp_path)
    sweep.save('s.json')
    r = CliRunner().invoke(cli.main, words, prog_name='optiq')
    assert r.exit_code in (1, 2) and name in r.output and 'Traceback' not in r.output, r.output
    assert [p.name for p in tmp_path.iterdir()] == ['s.json']

def texts_and_paths():
    for name, command in cli.main.commands.items():
        for p in command.params:
            text = isinstance(p.type, command_of._Filled) and getattr(p, 'flag_value', None) != 'stable'
            if text: yield pytest.param(name, p, id=f'{name} {p.name}')

@pytest.mark.parametrize('name, p', list(texts_and_paths()))
@pytest.mark.parametrize('empty', ['', ' '])
def test_an_empty_text_is_refused_by_its_name(name, p, empty):
    option = isinstance(p, click.Option)
    words = [name]+([p.opts[-1], empty] if option else [empty])+['demo']*(option and name != 'doctor')
    r = CliRunner().invoke(cli.main, words, prog_name='optiq')
    called = next(o for o in p.opts if o.startswith('--')) if option else p.metavar or p.name.upper() # not an older spelling
    assert r.exit_code == 2 and 'the value is empty; give one' in r.output and called in r.output

def test_every_text_has_that_type():
    for command in cli.main.commands.values():
        for p in command.params: assert p.type is not click.STRING and not isinstance(p.type, click.Path), p.name

def test_an_error_that_names_nothing_tells_what_was_given():
    command, given = cli.main.commands['pareto'], dict(targets='7', source='demo', as_json=True)
    assert command_of._named(ValueError('Maximum allowed size exceeded'), command, given).endswith('exceeded (given: --targets 7)')
    assert command_of._named(ValueError('demo is damaged'), command, given) == 'demo is damaged'
    assert command_of._named(ValueError('`targets` are none, target_bpw 3 is low'), command, given) == '--targets are none, --targets 3 is low'
    assert command_of._named(OSError('x.json is no file'), command, given) == 'x.json is no file'

def told_of() -> list: # of (function or class, parameter)
    source = ''.join(inspect.getsource(m) for m in (look, make))
    found = re.findall(r"@_options\('([\w.]+)', ((?:'\w+'(?:,\s+)?)+)", source)
    return sorted({(where, n) for where, names in found for n in re.findall(r'\w+', names)})

@pytest.mark.parametrize('where, name', told_of())
def test_an_option_says_what_python_says(where, name):
    "What we read from the source is what Python finds when it imports it"
    module, _, what = where.rpartition('.')
    p = inspect.signature(getattr(import_module(f'optiq.{module}'), what)).parameters[name]
    kind, default, said = options._parameters(where)[name]
    assert said and (inspect.Parameter.empty if default is None else ast.literal_eval(default)) == p.default
    given = p.annotation if isinstance(p.annotation, str) else inspect.formatannotation(p.annotation).replace('typing.', '')
    assert kind == re.sub(r'^Optional\[(.*)\]$', r'\1', given).removesuffix(' | None')

def test_a_sweep_file_is_read_again_when_it_changed(saved, tmp_path):
    from optiq.request import _load_sweep
    file = tmp_path/'s.json'
    file.write_bytes(saved)
    first = _load_sweep(file)
    first.header['calibration'] = 'added by a step'
    again = _load_sweep(str(file)), _load_sweep(file)
    assert all('calibration' not in s.header and s.values.keys() == first.values.keys() for s in again)
    file.write_bytes(saved.replace(b'"optiq": "sweep",', b'"optiq": "sweep", "calibration": "mine",', 1))
    assert _load_sweep(file).header['calibration'] == 'mine'

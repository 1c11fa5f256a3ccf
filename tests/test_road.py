"What a newcomer meets in Python: names that can be found, help that helps, and errors that say what is wrong"
import inspect, pydoc, re, subprocess, sys
from importlib import import_module
from pathlib import Path
import matplotlib.pyplot as plt
import numpy as np
import pytest
import optiq
from optiq.formats import Format, for_unit, parse_formats
from optiq.evals.perplexity import evaluate, overrides_of
from optiq.latency import latency
from optiq.measure.sweep import Sweep
from optiq.models import Checkpoint
from optiq.plan import baseline_plans, uniform
from optiq.readers import _check_types, _fits, _helpful, _hints
from optiq.refine import measured, verified
from optiq.rounding import RoundTrips
from optiq.show.explore import explore, explore_kv
from optiq.show.plots import plan_svg
from sweeps import block_units, make_sweep

ROAD = ['kl_sweep', 'load_sweep', 'allocate', 'pareto', 'convert', 'optimize', 'trade_off', 'compare', 'verify', 'predict_speeds']

def function(name):
    found = getattr(optiq, name)
    return found.convert if inspect.ismodule(found) else found

def test_what_numpy_and_samples_give_is_no_other_type():
    sample = dict(input_ids=np.zeros((1, 4), int))
    for name, given in [('kl_sweep', dict(rounding_tokens=[sample], tokens=[sample], progress=np.bool_(True), n=np.int64(4))),
                        ('kl_sweep', dict(rounding_tokens={}, max_memory=np.float32(1e9))), # statistics stand for their tokens
                        ('allocate', dict(target_bpw=np.float64(4.5), max_bytes=np.int64(5), protect=None)),
                        ('convert', dict(source=Path('x'), out=Path('y'), overwrite=np.bool_(False), quantizer={})),
                        ('verify', dict(model=Path('x'), text=[sample], within=np.float64(2)))]: _check_types(function(name), given)
    assert optiq.Weights(verify=np.bool_(True)).verify and optiq.Caps(context=np.int64(1)).context == 1
    with pytest.raises(ValueError, match='`verify` is .*array'): optiq.Weights(verify=np.array([True]))

def test_import_is_quick_and_leads_to_the_road():
    code = 'import time; t = time.perf_counter(); import optiq; print(time.perf_counter()-t); assert {*%r} <= {*dir(optiq)}' % ROAD
    assert min(float(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout) for _ in range(2)) < .1
    with pytest.raises(AttributeError, match="no attribute 'aloccate'"): optiq.aloccate
    assert all(callable(getattr(optiq, name)) for name in optiq.__all__)

def test_the_module_that_has_the_name_of_a_function_is_one(monkeypatch):
    from optiq import convert
    from optiq.convert import convert as same
    monkeypatch.setattr(convert, 'convert', lambda *args, **options: (args, options))
    assert convert('demo', 1, overwrite=True) == (('demo', 1), dict(overwrite=True)) and same is not convert

@pytest.mark.parametrize('name', ROAD)
def test_help_stands_alone(name):
    "What, units, errors, an example, and what the comments say of every parameter"
    f = function(name)
    text = pydoc.render_doc(f, renderer=pydoc.plaintext)
    said = dict(re.findall(r'^ {8}(\w+): (.+)', text.split('Parameters:')[1], re.M))
    told = [n for n, p in inspect.signature(f).parameters.items() if p.kind != p.VAR_KEYWORD]
    lacking = {*told}-{*said}-{'backend', 'trust_remote_code', 'model_type'}
    assert not lacking and re.search(r'nats|bits|seconds|MiB|folder', text) and re.search(r'[Rr]aise[sd]', text), (lacking, text)
    assert re.search(rf'^ {{8}}.*\b{name}\(', text, re.M), 'no example'
    assert text.count('Parameters:') == 1 and ' -- ' not in text

def noun(place):
    module, _, name = place.partition(':')
    return getattr(import_module(f'optiq.{module}'), name)

NOUNS = ['formats:Format', 'units:Unit', 'measure.sweep:Sweep', 'plan:Plan', 'report:Report', 'latency:Speeds', 'refine:Verified',
         'budget:Budget', *(f'request:{name}' for name in optiq.__all__ if isinstance(getattr(optiq, name), type))]

@pytest.mark.parametrize('place', NOUNS)
def test_help_of_a_class_says_what_its_fields_mean(place):
    from fastcore.docments import docments
    kind = noun(place)
    text = pydoc.render_doc(kind, renderer=pydoc.plaintext)
    said = dict(re.findall(r'^ \|      (\w+): (.+)', text.split('Parameters:')[1], re.M))
    told = {k: v for k, v in docments(kind).items() if k in kind.__dataclass_fields__}
    assert len(told) >= 2 and {k: said.get(k) for k in told if told[k]} == {k: v for k, v in told.items() if v}
    assert sum(map(bool, told.values())) >= len(told)-1, told

def test_help_without_source_stays_as_it_is():
    f = eval('lambda x: x')
    f.__doc__ = 'The same'
    assert _helpful(f).__doc__ == 'The same'

@pytest.fixture(scope='module')
def sweep():
    s = make_sweep(block_units(2), [Format(4, 64), Format(8, 64)], lambda u, f: np.full(3, 1/f.bits))
    return Sweep(s.units, s.formats, s.values, s.header)

def test_formats_come_in_any_form():
    two = [Format(4, 64), Format(8, 64)]
    assert parse_formats('4,8') == parse_formats([4, '8g64']) == parse_formats((4, 8)) == parse_formats(two) == parse_formats(' 4, 8,') == two
    assert parse_formats(4) == parse_formats('4') == parse_formats(two[:1]) == two[:1]

def test_any_form_will_do_from_the_road(sweep):
    one = [optiq.allocate(sweep, target_bpw=4, formats=f) for f in (4, '4', '4g64', [4], Format(4, 64))]
    assert all(dict(p) == dict(one[0]) for p in one)
    assert dict(optiq.allocate(sweep, target_bpw=6, formats='4,8')) == dict(optiq.allocate(sweep, target_bpw=6))
    assert [p.name for p in optiq.pareto(sweep, 5, 'all')] == ['all 5'] and len(optiq.pareto(sweep, np.arange(4, 6))) == 2
    assert sweep.kl(sweep.units[0].path, 4) == sweep.kl(sweep.units[0].path, '4g64') == .25

MISUSE = dict(
    formats_none=(lambda s: optiq.kl_sweep('demo', formats=4.5), '4.5 is not a format; write a width'),
    formats_text=(lambda s: optiq.kl_sweep('demo', formats='4,x'), "'x' is not a format; write a width"),
    n_zero=(lambda s: optiq.kl_sweep('demo', n=0), '`n` is 0, and should be a whole number of at least 1'),
    n_half=(lambda s: optiq.kl_sweep('demo', n=2.5), '`n` is 2.5, and should be a whole'),
    n_text=(lambda s: optiq.kl_sweep('demo', n='8'), "`n` is '8', and should be a whole"),
    n_true=(lambda s: optiq.kl_sweep('demo', n=True), '`n` is True, and should be a whole'),
    seq_len=(lambda s: optiq.kl_sweep('demo', seq_len=-1), '`seq_len` is -1, and should be a whole'),
    until=(lambda s: optiq.kl_sweep('demo', until='done'), "`until` is 'done', and should be 'stable' or None"),
    samples=(lambda s: optiq.compare('demo', n=0), '`n` is 0, and should be a whole'),
    texts=(lambda s: optiq.Texts(n_calibration=0), '`n_calibration` is 0, and should be a whole'),
    no_sweep=(lambda s: optiq.allocate('demo', target_bpw=4), "`sweep` is 'demo', and should be a Sweep: measured by kl_sweep"),
    plan=(lambda s: optiq.allocate(optiq.allocate(s, target_bpw=4), target_bpw=4), "`sweep` is Plan '4 bits'.*, and should be a Sweep"),
    curve=(lambda s: optiq.pareto('demo'), "`sweep` is 'demo', and should be a Sweep"),
    source=(lambda s: uniform('demo', 4), r"`source` is 'demo', .* a Sweep, a Checkpoint or a list, .*Checkpoint\('demo'\)"),
    baselines=(lambda s: baseline_plans(s.units[0].path), '`source` is .*, and should be a Sweep, a Checkpoint'),
    axes=(lambda s: uniform(s, 4).plot(ax=5), '`ax` is 5, and should be matplotlib axes: to draw on; new ones by default'),
    figure=(lambda s: s.plot(ax=plt.figure()), '`ax` is <Figure.*, and should be matplotlib axes'),
    drawn_plan=(lambda s: plan_svg('demo'), "`plan` is 'demo', and should be a Plan"),
    differs=(lambda s: uniform(s, 4).diff('4g64'), "`other` is '4g64', and should be a Plan: of the same model"),
    explained=(lambda s: uniform(s, 4).why(s.units[0].path, 'demo'), "`sweep` is 'demo', and should be a Sweep"),
    cap=(lambda s: optiq.allocate(s, target_bpw='4.5'), "`target_bpw` is '4.5', and should be a number"),
    no_cap=(lambda s: optiq.allocate(s), 'no cap; give target_bpw, '),
    targets=(lambda s: optiq.pareto(s, '3,4'), "`targets` holds '3,4', and should hold numbers"),
    curve_targets=(lambda s: optiq.trade_off('demo', '3,4'), "`targets` holds '3,4', and should hold numbers"),
    caps=(lambda s: optiq.optimize('demo', None, 4.5), r'`caps` is 4.5, and should be such as Caps\(target_bpw=4.5\)'),
    weights=(lambda s: optiq.optimize('demo', weights='4,8'), r"`weights` is '4,8', and should be such as Weights\("),
    no_plan=(lambda s: optiq.convert('demo', 4, 'out'), '`plan` is 4, and should be a Plan: for .*, made by allocate or uniform'),
    sweep_as_plan=(lambda s: optiq.convert('demo', s, 'out'), '`plan` is Sweep of .*, and should be a Plan: '),
    bits=(lambda s: Format('4', 64), "no MLX format has bits='4', group_size=64"),
    drawn=(lambda s: s.plot(fmt='5g64'), '5g64 was not measured; the sweep has 4g64, 8g64'),
    format=(lambda s: s.kl(s.units[0].path, 5), '5g64 was not measured; the sweep has 4g64, 8g64'),
    unit=(lambda s: s.kl('lm_heat', 4), 'lm_heat was not measured in 4g64'),
    model=(lambda s: optiq.kl_sweep(None), "`model` is None, and should be text, a Checkpoint or a Backend: 'demo', a folder"),
    tokens=(lambda s: optiq.kl_sweep('demo', [1, 2, 3]), r'`tokens` has the shape \(3,\) and the type int64, and should be a table'),
    no_tokens=(lambda s: optiq.kl_sweep('demo', []), r'`tokens` has the shape \(0,\)'),
    no_text=(lambda s: optiq.kl_sweep('demo', 'hello'), "`tokens` is 'hello', and should be a ndarray or a list"),
    memory=(lambda s: optiq.kl_sweep('demo', max_memory='16GB'), "`max_memory` is '16GB', and should be a number above 0: bytes for states"),
    no_memory=(lambda s: optiq.kl_sweep('demo', max_memory=-1), '`max_memory` is -1, and should be a number above 0'),
    budget=(lambda s: optiq.kl_sweep('demo', time_budget=float('nan')), '`time_budget` is nan, and should be a number above 0: seconds'),
    nan=(lambda s: optiq.kl_sweep('demo', targets=[float('nan')]), '`targets` holds nan, and should be a list, each a number above 0'),
    file=(lambda s: optiq.load_sweep(None), '`path` is None, and should be text: what `optiq sweep -o` or'),
    protect=(lambda s: optiq.allocate(s, target_bpw=4, protect=5), "`protect` is 5, and should be text or a list, each text: units that get"),
    pin=(lambda s: optiq.allocate(s, target_bpw=4, pin=5), '`pin` is 5, and should be a dict or text: name ▸ the one format'),
    leave=(lambda s: optiq.allocate(s, target_bpw=4, leave=5), '`leave` is 5, and should be text or a list, each text: names of units'),
    tie=(lambda s: optiq.allocate(s, target_bpw=4, tie=5), "`tie` is 5, and should be text, a list, each text or a function: 'qkv'"),
    protects=(lambda s: optiq.allocate(s, target_bpw=4, protect=['embed', 1]), '`protect` holds 1, and should be text or a list, each text'),
    ties=(lambda s: optiq.Weights(tie=[['q', 'k']]), '`tie` holds a list, and should be text, a list, each text'),
    profiles=(lambda s: optiq.pareto(s, profiles=[{}]), '`profiles` holds a dict, and should be text or a list, each text'),
    costs=(lambda s: optiq.allocate(s, max_ms=5, costs_ms=3), '`costs_ms` is 3, and should be a function:'),
    budgets=(lambda s: optiq.allocate(s, target_bpw=4, budgets=['x']), "`budgets` holds 'x', and should be a list, each a Budget"),
    negative=(lambda s: optiq.allocate(s, target_bpw=-4), '`target_bpw` is -4, and should be a number above 0: cap on nominal bits'),
    place=(lambda s: optiq.convert('demo', optiq.allocate(s, target_bpw=4), None), '`out` is None, and should be text: folder to write'),
    from_file=(lambda s: optiq.convert('demo', optiq.allocate(s, target_bpw=4), 'o', 's.json'),
               "`sweep` is 's.json', and should be a Sweep: .*load_sweep"),
    nothing=(lambda s: optiq.convert('demo', None, 'o'), '`plan` is None, and should be a Plan'),
    rounded=(lambda s: optiq.convert('demo', optiq.allocate(s, target_bpw=4), 'o', quantizer='gptq'),
             "`quantizer` is 'gptq', and should be a function"),
    caps_text=(lambda s: optiq.Caps(target_tps='fast'), "`target_tps` is 'fast', and should be a number above 0: decode"),
    caps_chip=(lambda s: optiq.Caps(chip=5), '`chip` is 5, and should be text: chip for `target_tps`'),
    context=(lambda s: optiq.Caps(context='4k'), "`context` is '4k', and should be a whole number: tokens in the KV cache"),
    way=(lambda s: optiq.optimize('demo', weights=optiq.Weights(method='fast')), "no method 'fast'; there are exact, screened and gradient"),
    nowhere=(lambda s: optiq.optimize('demo', weights=optiq.Weights(formats=[])), 'no formats to try; give some'),
    verified=(lambda s: optiq.Weights(verify='yes'), "`verify` is 'yes', and should be True or False: measure the plan"),
    tied=(lambda s: optiq.Cache(tie='kv'), "`tie` is 'kv', and should be True or False: keys and values"),
    text=(lambda s: optiq.Texts(calibration=5), '`calibration` is 5, and should be text or a list: text, pictures or speech'),
    output=(lambda s: optiq.optimize('demo', 5), '`out` is 5, and should be text: folder to write'),
    curve_nan=(lambda s: optiq.trade_off('demo', [4, float('nan')]), '`targets` holds nan, and should hold numbers above 0'),
    no_targets=(lambda s: optiq.trade_off('demo', []), '`targets` is empty; name some bits, or leave it out'),
    profile=(lambda s: optiq.trade_off('demo', 4, 'fast'), "no profile 'fast'; there are compact, quality, all"),
    points=(lambda s: optiq.trade_off('demo', 4, verify=-1), '`verify` is -1, and should be a whole number: points of each curve'),
    compared=(lambda s: optiq.compare(None), "`model` is None, and should be text"),
    within=(lambda s: optiq.verify('demo', 'demo', within='x'), "`within` is 'x', and should be a number above 0: accepted factor"),
    no_widths=(lambda s: optiq.predict_speeds('demo', []), 'no formats to predict; give some'),
    no_chip=(lambda s: optiq.predict_speeds('demo', chip=5), "`chip` is 5, and should be text: chip of the table"),
    table=(lambda s: optiq.compare('demo', n=np.zeros((9, 9))), r'`n` is array\(\[\[0., 0., 0., .* …, and should be a whole number'),
    many=(lambda s: parse_formats([np.zeros((9, 9))]), r'^array\(\[\[0., 0., 0., 0.*… is not a format; write a width'),
    endless=(lambda s: optiq.kl_sweep('demo', max_memory=float('inf')), '`max_memory` is inf, and should be a number above 0'),
    rounding=(lambda s: optiq.Weights(rounding=5), '`rounding` is 5, and should be minmax, search or gptq: by default that of'),
    polished=(lambda s: optiq.Weights(polish=[]), r'`polish` is a list, and should be dwq: train scales'),
    no_quantizer=(lambda s: for_unit({}, s.units[0].path), '`quantizer` has nothing for .*; give one for each unit'),
    explored=(lambda s: explore('demo'), "`sweep` is 'demo', and should be a Sweep: Sweep of a model's weights"),
    explored_none=(lambda s: explore_kv(None), '`sweep` is None, and should be a Sweep: Sweep of keys and values'),
    dragged=(lambda s: explore(s).drag('x'), "`value` is 'x', and should be a number above 0: of the cap"),
    by=(lambda s: explore(s).measure_by('weight'), "no cap 'weight'; there are nominal bits, "))

IDS = np.arange(16).reshape(2, 8)
TEXT = 'is a dict with input_ids, tokens or decoder_input_ids; this one is .*alone are an array, a row for each'
STRAY = {'model.layers.99.mlp.up_proj': Format(4, 64)}
MISUSE |= dict( # what was made for another model, and tokens in another form
    its_plan=(lambda s: optiq.convert('demo', uniform(s, 4), 'o'), 'the plan is of another model: .* in only one of the two; give one of demo'),
    its_sweep=(lambda s: optiq.convert('demo', uniform(Checkpoint('demo'), 4), 'o', s), 'the sweep is of another model: .* give one of demo'),
    its_verified=(lambda s: verified('demo', IDS, s, target_bpw=6), 'the sweep is of another model: .* give one of demo'),
    its_frontier=(lambda s: measured(optiq.pareto(s), 'demo', IDS), 'the frontier is of another model: .* give one of demo'),
    its_reason=(lambda s: uniform(Checkpoint('demo'), 4).why(Checkpoint('demo').units[0], s), 'the sweep is of another model'),
    its_speed=(lambda s: latency('demo', 'M3 Max').tps(uniform(s, 4)), 'the plan is of another model'),
    its_terms=(lambda s: latency('demo', 'M3 Max').terms({}), 'the plan is of another model'),
    its_overrides=(lambda s: evaluate('demo', IDS, dict(x=overrides_of(STRAY))), '99.mlp.up_proj is not in demo; give what was made for'),
    rows=(lambda s: optiq.kl_sweep('demo', IDS.tolist()), TEXT), ragged=(lambda s: optiq.kl_sweep('demo', [[1, 2, 3], [4, 5]]), TEXT),
    rows_scored=(lambda s: evaluate('demo', IDS.tolist(), {}), TEXT), rows_learned=(lambda s: RoundTrips('demo', IDS.tolist(), [4]), TEXT),
    samples=(lambda s: optiq.kl_sweep('demo', [dict(input_ids=IDS)], rounding='minmax'), 'demo reads text alone, so its tokens are'),
    no_sample=(lambda s: optiq.kl_sweep('demo', [{}]), 'this one has nothing'))

@pytest.mark.parametrize('case', MISUSE)
def test_misuse_is_told_in_the_words_of_the_caller(case, sweep):
    wrong, says = MISUSE[case]
    with pytest.raises(ValueError, match=says) as e: wrong(sweep)
    assert '\n' not in str(e.value) and not re.search(r'(^|\s)--[a-z]', str(e.value))

@pytest.mark.parametrize('wrong, says', [
    (lambda s: optiq.allocate(s, target_bits=4), "allocate() got an unexpected keyword argument 'target_bits'; near to it: target_bpw, "),
    (lambda s: optiq.allocate(), "allocate() missing a required argument: 'sweep'; help(allocate) shows all parameters"),
    (lambda s: optiq.allocate(s, 4), 'allocate() too many positional arguments; help(allocate) shows all parameters')])
def test_a_call_that_does_not_go_together_says_where_to_look(wrong, says, sweep):
    with pytest.raises(TypeError) as e: wrong(sweep)
    assert str(e.value).startswith(says) and '\n' not in str(e.value)

OPEN = ['plan', 'knapsack', 'frontier', 'refine', 'latency', 'report', 'measure.sweep', 'measure.estimate', 'sensitivity', 'pipeline', 'fit',
        'chat', 'score', 'convert', 'evals.verify', 'kv.sweep', 'show.plots', 'show.explore', 'show.demos', 'show.page', 'show.upload']

def functions_of(module):
    "Public functions and methods by name"
    m = import_module(f'optiq.{module}')
    found = {n: getattr(m, n) for n in m.__all__}
    methods = {f'{n}.{k}': f for n, c in found.items() if inspect.isclass(c) for k, f in vars(c).items() if not k.startswith('_')}
    return {k: f for k, f in {**found, **methods}.items() if inspect.isfunction(f)}

@pytest.mark.parametrize('module', OPEN)
def test_an_object_of_another_class_is_told_at_the_door(module):
    "What takes one of our objects looks at it, and an error in one line names the parameter"
    for name, f in functions_of(module).items():
        inside, given = inspect.unwrap(f), {'ax', 'sweep', 'source', 'plan', 'other', 'frontier', 'model'} & {*inspect.signature(f).parameters}
        assert not given or inside is not f and given <= {*inside.__annotations__}, name
        for k, hint in _hints(inside).items() if inside is not f else ():
            if _fits(wrong := object(), hint): continue # it says nothing about what it takes
            with pytest.raises(ValueError, match=f'^`{k}` is <object.* and should be [a-zT]') as e: _check_types(inside, {k: wrong})
            assert '\n' not in str(e.value), name

@pytest.mark.parametrize('name', ROAD)
def test_every_annotation_of_the_road_can_be_read(name):
    f = inspect.unwrap(function(name))
    assert _hints(f).keys() == f.__annotations__.keys()-{'return', 'cls'}

def test_another_file_is_no_sweep(sweep, tmp_path):
    optiq.allocate(sweep, target_bpw=4).save(tmp_path/'plan.json')
    with pytest.raises(ValueError, match='plan.json is not a sweep, but a plan; `optiq sweep` writes one'):
        optiq.load_sweep(tmp_path/'plan.json')
    with pytest.raises(FileNotFoundError, match='there is no such file'): optiq.load_sweep('none.json')

def test_errors_of_python_name_no_flags():
    "The command puts its flags in the place of what stands in backticks; only what is about a command line names them itself"
    about_commands = ('cli.py', 'command.py', 'options.py', 'make.py', 'look.py', 'serve.py', 'guard.py', 'doctor.py', 'chat.py',
                      'fit.py', 'page.py', 'upload.py')
    package = Path(optiq.__file__).parent
    texts = {p: p.read_text(encoding='utf-8') for p in package.rglob('*.py') if p.name not in about_commands}
    found = [f'{p.relative_to(package)}: {m[0]}' for p, t in texts.items() for m in re.finditer(r'[^`\n]{0,40}[ (\'"]--[a-z][a-z-]+[^\n]*', t)]
    assert not [f for f in found if 'optiq ' not in f and 'mlx_vlm.generate ' not in f], found # a model card may name a command to run

def test_a_conversion_ends_in_words(tmp_path):
    from optiq.commands.make import _in_words, _next_steps
    from optiq.report import Report
    row = lambda name, mb, bits, kl, se=.001: dict(name=name, size_mb=mb, true_bpw=bits, kl=kl, kl_se=se, agreement=1-kl)
    rows = [row('reference', 1200, 16, 0), row('optiq', 338, 4.5, .05)]
    rows += [row('uniform 3g64', 260, 3.5, .4), row('uniform 4g64', 340, 4.52, .09, float('nan'))]
    about = dict(evaluation='bundled, 16 × 256 tokens, 0f3a')
    assert _in_words(Report(rows, about), False).split('\n') == [
        'The model is 338.0 MB, 4.50 bits per weight; the original is 1,200.0 MB.',
        'On text that it was not calibrated on (bundled, 16 × 256 tokens): '
        'the same next token as the original 95.0% of the time, KL 0.0500 ± 0.0010.',
        'Nearest in size is uniform 4g64, 340.0 MB: the same next token as the original 91.0% of the time, KL 0.0900.']
    assert _in_words(Report(rows, about | dict(rounding='search')), False).split('\n')[-1].startswith('Lower KL at the same size')
    alone = _in_words(Report(rows[:2], about), True)
    assert alone.startswith('The model would be') and len(alone.split('\n')) == 2
    found = _next_steps('demo', dict(trust_remote_code=False, model_type='auto')).split('\n')
    assert found == ['written to demo; to use it:', '    mlx_lm.generate --model demo --prompt "Hello"', '    optiq serve demo']

def test_a_bar_knows_what_late_blocks_cost(monkeypatch):
    "Ten weights at .2 s each, and runs of a block at .01 s each: half of the weights are done, and a fifth of the runs"
    from types import SimpleNamespace
    from optiq.measure import log as module
    runs, moved = (2, 3, 4, 5, 6), []
    clock = iter(np.cumsum([0, *[.2+.01*n for n in runs]]))
    monkeypatch.setattr(module, 'time', SimpleNamespace(perf_counter=lambda: next(clock)))
    share = module._Share(SimpleNamespace(n=0, update=moved.append), 100, 10)
    for n in runs: share(n, 1)
    assert moved[-1] == pytest.approx((5*.2+20*.01)/(10*.2+100*.01)) and max(moved) <= 1

def site():
    "tools/site.py, which has the name of a module of Python's own"
    from importlib.util import module_from_spec, spec_from_file_location
    tools = Path(__file__).parents[1]/'tools'
    spec = spec_from_file_location('tools_site', tools/'site.py')
    with pytest.MonkeyPatch.context() as m:
        m.syspath_prepend(tools) # as for a script
        spec.loader.exec_module(module := module_from_spec(spec))
    return module

def test_the_manual_is_what_the_help_says():
    import click
    from optiq.cli import main
    notebook = site().with_manual(dict(cells=[dict(cell_type='markdown', source=['## convert'])]))
    text = '\n'.join(''.join(c['source']) for c in notebook['cells'])
    assert [''.join(c['source'])[:10] for c in notebook['cells'][:1]] == ['## convert'] and text.count('<table') == len(main.commands)
    for name, command in main.commands.items():
        assert f'## {name}\n' in text and f'optiq {name} ' in text
        for p in command.params:
            if not isinstance(p, click.Option) or p.hidden: continue
            assert next(o for o in p.opts if o.startswith('--')) in text, (name, p.opts)
    assert not re.search(r'[\x00-\x08\x0b-\x1f]|–', text) and '<td>128</td>' in text

def test_signatures_are_code():
    said = ('```python\ndef f(\n    a:__main__.Caps | None, # as [`g`](kv.html#g), or [1]\n'
            '    tick:function=<lambda>,\n    b:NoneType=None\n)->int:\n```\n\n'
            '*What [`g`](kv.html#g) does*\n\n    f(1)\n\nParameters:\n    a: one\n    tick: two')
    assert site().calm(said) == ('```python\ndef f(\n    a:Caps | None, # as `g`, or [1]\n'
        '    tick:Callable=…,\n    b=None\n)->int:\n```\n\n'
        '*What [`g`](kv.html#g) does*\n\n    f(1)\n')

ONCE = {'sweep': '--bits --samples', 'pareto': '--bits --samples', 'latency': '--bits', 'convert': '--n-samples', 'benchmark': '--n-samples',
        'eval': '--n-samples', 'kv-cache': '--n-samples --eval-samples --target-bpw',
        'compare': '--n-samples', 'verify': '--text', 'demo': '--text'}

@pytest.mark.parametrize('name, old', ONCE.items())
def test_one_thing_has_one_name(name, old):
    "Spellings that were published count; help and errors know the one that all commands share"
    from click.testing import CliRunner
    from optiq.cli import main
    said = CliRunner().invoke(main, [name, '--help']).stdout
    one = {'bits': '--candidate-bits', 'n': '--n-evaluation', 'n_evaluation': '--n-evaluation', 'n_calibration': '--n-calibration',
           'text': '--calibration', 'target_bpw': '--target-bits'}
    for word in old.split():
        p = next(p for p in main.commands[name].params if word in p.opts)
        new = '--n-calibration' if word == '--samples' else one[p.name]
        assert p.opts[0] == new and re.search(rf'^ +{new} ', said, re.M) and not re.search(rf'^ +{word}\b|, {word}\b', said, re.M)

@pytest.mark.parametrize('words', [['kv-cache', 'demo', '--target-bpw', '0'], ['eval', 'demo', '--task', 'kl', '--n-samples', '0'],
                                   ['compare', 'demo', 'demo', '--n-samples', 'x']])
def test_an_error_shows_the_name_that_the_help_shows(words):
    from click.testing import CliRunner
    from optiq.cli import main
    r = CliRunner().invoke(main, words)
    assert r.exit_code == 2 and re.search(r"Invalid value for '--(target-bits|n-evaluation)': ", r.output) and words[-2] not in r.output

TOGETHER = {'--n-calibration': '--calibration --seq-len', '--n-evaluation': '--evaluation --seq-len',
            '--candidate-bits': '--formats --group-size',
            '--rounding': '--rounding-samples --statistics --dtype --method --time-budget',
            '--backend': '--trust-remote-code --max-memory --json',
            '--pin': '--ceiling --floor --leave --protect --tie', '--model-type': '--trust-remote-code'}
APART = dict(target_bpw={'--target-bpw', '--target-bits'}, # bits of weights, and of keys and values
             max_memory={'--target-memory', '--max-memory'}, # of the model that is made, and of scoring it
             n={'--n-evaluation', '--n-calibration'}, tie={'--tie', '--split-kv'})

def test_what_one_command_calls_so_every_command_does():
    "Options that mean something together stand together, and no command shows a name of its own for what another one has"
    from optiq.cli import main
    def first(p): return next(o for o in p.opts if o.startswith('--'))
    shown = {n: {first(p) for p in c.params if p.param_type_name == 'option'} for n, c in main.commands.items()}
    lacking = {(n, one, o) for n, has in shown.items() for one, others in TOGETHER.items() if one in has for o in others.split() if o not in has}
    assert not lacking, lacking
    assert {n for n, has in shown.items() if '--backend' in has and '--model-type' not in has} == {'compare'} # its answers are text
    called = {} # what Python calls a value ▸ what commands call it
    for c in main.commands.values():
        for p in c.params:
            if p.param_type_name == 'option': called.setdefault(p.name, set()).add(first(p))
    assert {k: v for k, v in called.items() if len(v) > 1} == APART

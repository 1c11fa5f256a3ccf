__version__ = "0.1.0"

# nbdev writes the line above; the rest is written here. A name is imported when it is first asked for.
_ROAD = dict(
    kl_sweep='sensitivity', load_sweep='measure.sweep:Sweep.load', allocate='knapsack', pareto='knapsack',
    convert='convert', optimize='pipeline', trade_off='pipeline', compare='pipeline', verify='evals.verify',
    predict_speeds='latency')
_WORDS = dict(Caps='pipeline', Weights='pipeline', Cache='pipeline', Texts='pipeline')
__all__: list[str] = [*_ROAD, *_WORDS] # the same objects, offered once more

def __getattr__(name):
    "What stands at a stop of the road, and the words in which `optimize` is asked"
    from importlib import import_module
    from operator import attrgetter
    if name not in __all__: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    module, _, path = (_ROAD | _WORDS)[name].partition(':')
    found = attrgetter(path or name)(import_module(f'{__name__}.{module}'))
    return globals().setdefault(name, found)

def __dir__(): return sorted([*globals(), *__all__])

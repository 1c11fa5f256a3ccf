"What all tests share: no network, and the models and data that lie beside the repository where there are any"
import gc
import os
from pathlib import Path
import pytest
import fast # noqa: F401, before MLX

os.environ.setdefault('MLX_DISABLE_COMPILE', '1') # on a CPU every compiled function costs seconds of a C++ compiler
os.environ.update(HF_HUB_OFFLINE='1', TRANSFORMERS_OFFLINE='1', HF_DATASETS_OFFLINE='1')

@pytest.fixture(scope='session')
def shared():
    "The folder of models and data that are too large for the repository"
    folder = Path(os.environ.get('OPTIQ_SHARED') or Path(__file__).parents[1].parent/'shared')
    if not folder.is_dir(): pytest.skip('needs the shared folder: set OPTIQ_SHARED')
    return folder

LONG = ('test_commands', 'test_families', 'test_refine', 'test_sensitivity', 'test_vlm', 'test_turbo_kernels',
        'test_eval_models', 'test_streaming', 'test_rounding', 'test_labels', 'test_serve', 'test_explore',
        'test_parts', 'test_files', 'test_progress', 'test_backend', 'test_knapsack', 'test_saved_is_measured',
        'test_guard', 'test_room', 'test_trust', 'test_turboquant', 'test_kv_cache', 'test_solver', 'test_evals') # in seconds

gc.disable() # while everything is imported

def pytest_collection_finish():
    "What was imported stays: to look for garbage in it again and again is a tenth of the time of all tests"
    gc.freeze()
    gc.set_threshold(10_000)
    gc.enable()

def pytest_collection_modifyitems(items):
    "The longest files first, so that no worker waits for the other at the end"
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))

def pytest_configure(config):
    "What the tests of caches share; a process that only hands tests to workers does without, and need not import everything"
    if hasattr(config, 'workerinput') or not config.getoption('numprocesses', None): config.pluginmanager.import_plugin('kv_models')

"What all tests share: no network, and the models and data that lie beside the repository where there are any"
import os
from pathlib import Path
import pytest

os.environ.setdefault('MLX_DISABLE_COMPILE', '1') # on a CPU every compiled function costs seconds of a C++ compiler
os.environ.update(HF_HUB_OFFLINE='1', TRANSFORMERS_OFFLINE='1', HF_DATASETS_OFFLINE='1')

@pytest.fixture(scope='session')
def shared():
    "The folder of models and data that are too large for the repository"
    folder = Path(os.environ.get('OPTIQ_SHARED') or Path(__file__).parents[1].parent/'shared')
    if not folder.is_dir(): pytest.skip('needs the shared folder: set OPTIQ_SHARED')
    return folder

pytest_plugins = ['kv_models']

"kv_config.json: what is written is read, and what does not fit is refused"
import json

import pytest

from optiq.kv.cache import mixed_caches
from optiq.kv.config import kv_config, read_kv_config, save_kv_config
from optiq.kv.layout import kv_layout
from optiq.material.tiny import tiny
from optiq.models import Checkpoint
from optiq.plan import uniform

@pytest.mark.parametrize('change, message', [
    (dict(optiq='plan'), 'is not a kv_config'), (dict(version=2), 'version 2, and this optiq reads 1'),
    (dict(layers=None), 'layers is null, and should be a list'), (dict(layers=[{}]), r'layers\[0\] lacks layer and heads')])
def test_broken_configs(served, change, message):
    with pytest.raises(ValueError, match=message): read_kv_config(served[1] | change, served[0])

@pytest.mark.parametrize('change, message', [
    (dict(keys='7g64'), "keys is '7g64', and should be a format"), (dict(values='what'), "values is 'what', and should be a format"),
    (dict(heads=17), r'layer 0 has heads and widths \(17'), (dict(layer=5), 'layer'), (dict(key_dim=1), 'heads and widths')])
def test_layers_that_do_not_fit(served, change, message):
    model, config, *_ = served
    rows = [config['layers'][0] | change, *config['layers'][1:]]
    if 'layer' in change: rows, message = rows[1:], 'it has 1 layers, this model has 2'
    with pytest.raises(ValueError, match=message): read_kv_config(config | dict(layers=rows), model)

def test_config_on_disk(served, tmp_path):
    model, config, *_ = served
    save_kv_config(config, tmp_path/'c.json')
    assert json.loads((tmp_path/'c.json').read_text()) == config
    assert read_kv_config(tmp_path/'c.json', model) == read_kv_config(config)
    (tmp_path/'c.json').write_text('{')
    with pytest.raises(ValueError, match='c.json is not a kv_config'): read_kv_config(tmp_path/'c.json')

def test_layers_that_cannot_be_quantized_are_refused(tmp_path):
    c = Checkpoint(tiny('qwen3_5', tmp_path/'q'), model_type='llm')
    layout = kv_layout(c, 64)
    config = kv_config(uniform(layout, 4), layout)
    assert config['layers'][0]['left'] == 'recurrent state' and config['layers'][0]['keys'] == 'as-is'
    assert sum(r.get('nbytes', 0) for r in config['layers']) == layout.other_bytes
    caches = mixed_caches(c.load(), read_kv_config(config, c.load()))
    assert [type(x).__name__ for x in caches] == ['ArraysCache']*3+['MixedKVCache']
    config['layers'][0]['keys'] = '4g64'
    with pytest.raises(ValueError, match='layer 0 cannot be quantized: recurrent state'): read_kv_config(config, c.load())

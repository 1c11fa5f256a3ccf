"The planned changes of bench/mutants.py: each can be made, and the tests that should notice it are there"
import sys
from pathlib import Path
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]/'bench'))
from mutants import CHANGES, faults, files_of, nodes_of, sources # noqa: E402

def test_every_change_can_be_made():
    texts = sources()
    assert not [f for c in CHANGES for f in faults(c, texts)]

def test_tests_are_found_by_the_beginning_of_their_names():
    assert files_of('test_tests_are_found_by') == ('tests/test_mutants.py',)
    nodes = nodes_of(['test_mutants::test_every', 'test_tests_are_found'])
    assert nodes == (['tests/test_mutants.py'], ['-k', 'test_every or test_tests_are_found'])
    with pytest.raises(ValueError, match='no test begins'): files_of('test_doctor::test_that_nobody_wrote')

"""Files that are damaged or cannot be written: no sound evaluation is lost, none is recorded twice, and the run goes on."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from pathlib import Path

import pytest

from secateur.envs.core import InputError
from secateur.search.run.study import DAMAGED, JOURNAL, load_study
from tests.faults.conftest import EVALUATIONS, assert_continued, in_child, resume, run, trials

pytestmark = pytest.mark.faults


@pytest.fixture
def copy(tmp_path, straight):
    """A finished run whose files may be damaged."""
    return Path(shutil.copytree(straight, tmp_path / "run"))


def as_set(evaluations):
    return {json.dumps(one, sort_keys=True) for one in evaluations}


def assert_repaired(folder, straight, kept):
    """Resume a run whose study is damaged; check that at least `kept` evaluations were sound and all are there at the end."""
    journal = (folder / JOURNAL).read_bytes()
    resume(folder)
    after = trials(folder)
    assert len(after) == EVALUATIONS and as_set(after) == as_set(trials(straight))
    assert [trial.user_attrs["evaluation"] for trial in load_study(folder).trials] == list(range(EVALUATIONS))
    if (folder / DAMAGED).is_file():
        assert (folder / DAMAGED).read_bytes() == journal
    return after


@pytest.mark.parametrize("share", [0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 0.999])
def test_a_study_that_is_cut_off_anywhere_keeps_what_is_before(copy, straight, share):
    journal = copy / JOURNAL
    content = journal.read_bytes()[: int(share * journal.stat().st_size)]
    journal.write_bytes(content)
    whole = content.count(b'\n{"op_code":4,') - (not content.endswith(b"\n"))
    assert_continued(copy, straight, trials(straight)[: max(whole, 0)])


@pytest.mark.parametrize("line", range(18))
def test_a_damaged_line_of_the_study_costs_one_evaluation_at_most(copy, straight, line):
    """Bytes in the middle of a line are overwritten: of the study's own lines, and of evaluations."""
    journal = copy / JOURNAL
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 15, "seven lines of the study, and those of the evaluations"
    if line < len(lines):
        middle = len(lines[line]) // 2
        lines[line] = lines[line][:middle] + b"\x00\xff\n" + lines[line][middle + 3 :]
    else:
        del lines[2 * (line - len(lines)) + 1]
    journal.write_bytes(b"".join(lines))
    assert_repaired(copy, straight, EVALUATIONS - 1)


@pytest.mark.parametrize("name", ['"values":[', '"params":{"prune_ratio/first":', '"cost/macs":', '"evaluation":', '"seconds":'])
def test_a_changed_digit_is_noticed(copy, straight, name):
    """The line is still valid JSON: only its checksum tells."""
    journal = copy / JOURNAL
    lines = journal.read_text().splitlines(keepends=True)
    before, found, rest = lines[10].partition(name)
    assert found
    place = next(index for index, sign in enumerate(rest) if sign.isdigit())
    lines[10] = before + found + rest[:place] + str((int(rest[place]) + 1) % 10) + rest[place + 1 :]
    journal.write_text("".join(lines))
    after = assert_repaired(copy, straight, EVALUATIONS - 1)
    assert (copy / DAMAGED).is_file()
    assert after[:3] == trials(straight)[:3] and after[3:7] == trials(straight)[4:8]


@pytest.mark.parametrize("name", ["manifest.json", "front.json", "front.csv"])
@pytest.mark.parametrize("damage", [b"", b"{", b'{"schema": 2}', b"[1, 2]", b"\x00\xff\x00"])
def test_other_damaged_files_are_refused_or_written_anew(copy, straight, name, damage):
    (copy / name).write_bytes(damage)
    before = (copy / JOURNAL).read_bytes()
    if name == "manifest.json":
        with pytest.raises(InputError, match="manifest.json (is damaged|cannot be read)"):
            resume(copy)
        assert (copy / JOURNAL).read_bytes() == before
    else:
        assert_continued(copy, straight, trials(straight))


@pytest.mark.parametrize("room", [100, 700, 2000, 3200, 4500, 6000])
def test_a_full_disk_ends_the_search_with_one_sentence(tmp_path, straight, room):
    """No file can grow beyond `room` bytes, as on a disk without room: in the manifest, the study, or its evaluations."""

    def search():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing raises OSError
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, unlimited[1]))
        try:
            run(tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    assert in_child(search) == 1
    folder, message = tmp_path / "run", Path("child.txt").read_text()
    assert message.startswith(f"InputError: {folder} cannot be written: [Errno 27] File too large"), message
    assert "Make room, then continue: secateur.resume(" in message
    if (folder / "manifest.json").is_file():
        before = trials(folder) if room > 2500 else []
        assert_continued(folder, straight, before)

"""From what the hosts answered to the lines of `launch-check`. Nothing here asks anybody anything."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pretrain.errors import DISK_ERRNOS, ConfigError, DataError, DiskError
from pretrain.launch.hostfile import Host
from pretrain.launch.needs import Needs
from pretrain.report.findings import Check, shown_bytes

Answer = Mapping[str, Any]
MOST_SECONDS_APART = 2.0  # of clocks; NTP keeps them within milliseconds
# Whose login shells do not know `export`, with which deepspeed's command line begins.
OTHER_SHELLS = ("csh", "tcsh")


@dataclass(frozen=True)
class Asked:
    """What one host answered; facts without `error` and with `folder` None are complete.

    clock: (seconds ahead of the first host, how wrong that may be).
    """

    host: Host
    facts: Answer
    clock: tuple[float, float] | None = None

    @property
    def usable(self) -> bool:
        return "error" not in self.facts and self.facts.get("folder") is None


def judge_hosts(asked: Sequence[Asked], here: Answer, needs: Needs, exports: Mapping[str, str]) -> Iterator[Check]:
    """One line for each problem of a host. here: the facts of the machine that will start deepspeed."""
    machines: dict[str, str] = {}
    gpus = any(one.usable and one.facts["gpus"] for one in asked)
    for one in asked:
        name, facts = one.host.name, one.facts
        if "error" in facts:
            yield Check("FAIL", name, str(facts["error"]))
            continue
        if facts["shell"] in OTHER_SHELLS:
            must = "must be sh or another that knows `export`, because deepspeed's command line begins with it"
            yield Check("FAIL", name, f"the login shell {must}, is {facts['shell']}")
        if facts["folder"] is not None:
            where = f"`{exports['PYTHONPATH'].split(':')[0]}` cannot be entered: {facts['folder']}"
            yield Check("FAIL", name, f"{where}; every host needs the checkout at this path")
            continue
        if (other := machines.setdefault(str(facts["machine"]), name)) != name:
            yield Check("FAIL", name, f"must be another machine than {other}, both say they are {facts['name']}")
        yield from _software(name, facts, here)
        yield from _data(name, facts, here, needs)
        yield from _room(one, needs, gpus)
        yield from _network(one, len(asked), gpus, exports)


def judge_port(
    hosts: Sequence[Host], address: str, port: int, listening: Answer, heard: Sequence[Answer], word: str
) -> Iterator[Check]:
    """Whether rank 0 can wait there, and whether those on the other hosts find it. heard: of all but the first."""
    first, *others = hosts
    if "error" in listening:
        text = f"port {port} cannot be used: {listening['error']}; another run? give --master_port another one"
        yield Check("FAIL", first.name, text)
        return
    for host, answer in zip(others, heard, strict=True):
        if "error" in answer:
            text = f"cannot reach {first.name} at {address} port {port}: {answer['error']}"
            yield Check("FAIL", host.name, f"{text}; a firewall, or give --master_addr another address of {first.name}")
        elif answer.get("heard") != word:
            text = f"{address} port {port} is not {first.name}, something else answers there"
            yield Check("FAIL", host.name, f"{text}: give --master_addr the address by which all reach {first.name}")


def judge_folder(
    hosts: Sequence[Host], folders: Sequence[str], wrote: Sequence[Answer], seen: Sequence[Answer], names: Sequence[str]
) -> Iterator[Check]:
    """Whether all write into one folder. seen: what each sees, of `names`, where the first one wrote."""
    for host, folder, answer in zip(hosts, folders, wrote, strict=True):
        if "error" in answer:
            error = DiskError if answer.get("errno") in DISK_ERRNOS else ConfigError
            yield Check("FAIL", host.name, f"`{folder}` cannot be written: {answer['error']}", error)
    written = {name for name, answer in zip(names, wrote, strict=True) if "error" not in answer}
    by_first = set(seen[0].get("seen", ()))
    for host, name, answer in zip(hosts[1:], names[1:], seen[1:], strict=True):
        unseen = written & ({name} - by_first | {names[0]} - set(answer.get("seen", ())))
        if unseen:
            text = f"`{folders[0]}` must be one folder for all, {host.name} and {hosts[0].name} see different ones"
            yield Check("FAIL", host.name, f"{text}: put `runs` on a shared file system")


def _software(name: str, facts: Answer, here: Answer) -> Iterator[Check]:
    versions = {"python": (facts["python"], here["python"])}
    versions |= {package: (facts["packages"].get(package), wanted) for package, wanted in here["packages"].items()}
    for what, (found, wanted) in versions.items():
        if found != wanted:
            yield Check("FAIL", name, f"{what} must be {wanted or 'absent'}, as here, is {found or 'not installed'}")
    paths = sorted(here["code"].keys() | facts["code"].keys())
    if other := [path for path in paths if here["code"].get(path) != facts["code"].get(path)]:
        more = f" and {len(other) - 1} more files" if len(other) > 1 else ""
        text = f"`{other[0]}`{more} must be as here: bring all hosts to the same revision"
        yield Check("FAIL", name, text)


def _data(name: str, facts: Answer, here: Answer, needs: Needs) -> Iterator[Check]:
    for path, wanted in here["files"].items():
        if (found := facts["files"].get(path)) != wanted:
            yield Check("FAIL", name, f"`{path}` must be as here, is {'another one' if found else 'not there'}")
    where, mine, theirs = needs.settings.data.path, here["data"], facts["data"]
    if theirs["manifest"] != mine["manifest"]:
        what = "is another one" if theirs["manifest"] else "has no manifest.json that can be read"
        yield Check("FAIL", name, f"data folder `{where}` must be the one that is here, {what}", DataError)
    elif theirs["wrong"] != mine["wrong"]:
        text = f"data folder `{where}` must be whole: `{theirs['wrong']}` is missing or has another size"
        yield Check("FAIL", name, text, DataError)


def _room(one: Asked, needs: Needs, gpus: bool) -> Iterator[Check]:
    name, facts, slots = one.host.name, one.facts, one.host.slots
    if needs.disk > facts["free"]:
        text = f"`{facts['run']}` must have room for {needs.settings.train.keep + 1} checkpoints"
        found = f"{shown_bytes(needs.disk)}; {shown_bytes(facts['free'])} are free"
        yield Check("FAIL", name, f"{text}, {found}: lower `train.keep` or choose another `runs`", DiskError)
    memory = needs.memory["cuda" if gpus else "cpu"]
    in_host = slots * (memory.in_host if gpus else memory.everywhere)
    if in_host > facts["memory"]["total"]:
        total = shown_bytes(facts["memory"]["total"])
        yield Check("FAIL", name, f"{slots} rank(s) must fit in its memory of {total}, need {shown_bytes(in_host)}")
    if isinstance(facts["gpus"], str):
        yield Check("FAIL", name, f"torch cannot count the GPUs: {facts['gpus']}")
    elif gpus and len(facts["gpus"]) < slots:
        text = f"must have the {slots} GPUs that the hostfile gives it, torch sees {len(facts['gpus'])}"
        yield Check("FAIL", name, f"{text}: lower `slots`, or look with `python -m pretrain doctor` there")
    elif gpus and memory.total > (least := min(facts["gpus"][:slots])):
        yield Check(
            "FAIL", name, f"a rank must fit in a GPU of {shown_bytes(least)}, needs {shown_bytes(memory.total)}"
        )
    elif not gpus and slots > facts["cores"]:
        yield Check("warn", name, f"{slots} ranks share {facts['cores']} core(s)")


def _network(one: Asked, hosts: int, gpus: bool, exports: Mapping[str, str]) -> Iterator[Check]:
    name, own = one.host.name, one.facts["own"]
    lonely = own is None or own.startswith("127.") or own == "::1"
    if hosts > 1 and not gpus and lonely and "GLOO_SOCKET_IFNAME" not in exports:
        means = f"its own name {one.facts['name']} means {own or 'nothing'} there, which gloo would tell to the others"
        yield Check("FAIL", name, f"{means}: mend /etc/hosts, or put GLOO_SOCKET_IFNAME=... into .deepspeed_env")
    if one.clock is not None and abs(one.clock[0]) - one.clock[1] > MOST_SECONDS_APART:
        apart, way = abs(one.clock[0]), "ahead of" if one.clock[0] > 0 else "behind"
        yield Check("FAIL", name, f"its clock is {apart:.1f} s {way} that of the first host: start NTP there")

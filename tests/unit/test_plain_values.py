"""What is written in a YAML or on the command line arrives as its field's type says, in every kind of field."""

import pytest
from conftest import write_yaml

from r1dist.config import ChatRun, EvaluateRun, GRPORun, SampleRun, ServeRun, SFTRun
from r1dist.config.loader import as_tree, build, parse
from r1dist.config.pipeline import PipelineRun
from r1dist.config.plain import load
from r1dist.errors import UserError
from r1dist.rewards.registry import check_rewards

# What YAML 1.1, or 1.2, takes for something else than text.
WORDS = [
    "8:00:00", "30:00", "1:30.5", "2026-09-13", "2026-09-13 12:00:00", "20260913", "1234", "017", "0o17", "0x1F",
    "1_000", "12e03", "1e5", "1.50", "+5", "-0", ".5", "5.", ".inf", "-.inf", ".nan", "yes", "no", "on", "off", "y",
    "N", "0b11", "true", "False", "=", "1,000", "190:20:30", "685_230.15",
]  # fmt: skip
PIPELINE = {
    "output_dir": "runs/x", "evaluate": "e.yaml", "accelerate": "a.yaml",
    "stages": [{"name": "base", "kind": "base", "model": "tiny"}],
}  # fmt: skip
SFT = {"model": {"path": "tiny"}, "data": {"sources": [{"path": "tiny"}]}, "output_dir": "runs/x"}
SAMPLE = {
    "output_dir": "runs/x",
    "generators": [{"name": "g", "model": {"path": "tiny"}, "data": {"sources": [{"path": "tiny"}]}}],
}
# Class, smallest configuration, dotted name of a text field (or of an entry of a dictionary or list of texts).
TEXTS = [
    (SFTRun, SFT, "run_name"),
    (SFTRun, SFT, "output_dir"),
    (SFTRun, {**SFT, "push_to_hub": True}, "hub_model_id"),
    (SFTRun, SFT, "model.path"),
    (SFTRun, SFT, "model.tokenizer"),
    (SFTRun, SFT, "data.sources.0.path"),
    (SFTRun, SFT, "data.sources.0.subset"),
    (SFTRun, SFT, "data.sources.0.kind"),
    (SFTRun, SFT, "data.sources.0.problem"),
    (SampleRun, SAMPLE, "generators.0.prompting.prefill"),
    (SampleRun, SAMPLE, "generators.0.prompting.instruction"),
    (SampleRun, SAMPLE, "rollout.serve.devices"),
    (PipelineRun, PIPELINE, "sbatch.time"),
    (PipelineRun, PIPELINE, "stages.0.sbatch.time"),
    (PipelineRun, PIPELINE, "stages.0.model"),
]


def at(tree, name):
    for part in name.split("."):
        tree = tree[int(part)] if isinstance(tree, list) else tree[part]
    return tree


def merged(tree, name, marker):
    """`tree` with `marker` at the dotted name."""
    *outer, last = name.split(".")
    if not outer:
        return {**tree, last: marker}
    head, rest = outer[0], ".".join([*outer[1:], last])
    if isinstance(tree, list):
        return [merged(tree[0], rest, marker)]
    return {**tree, head: merged(tree.get(head, {}), rest, marker)}


@pytest.mark.parametrize(("run_class", "tree", "name"), TEXTS)
def test_text_fields_keep_what_is_written(tmp_path, run_class, tree, name):
    file = write_yaml(tmp_path / "run.yaml", merged(tree, name, "MARKER"))
    template = file.read_text()
    for word in WORDS:
        file.write_text(template.replace("MARKER", word))
        assert at(as_tree(parse(run_class, ["--config", str(file)])), name) == word
        run = parse(run_class, ["--config", str(write_yaml(tmp_path / "plain.yaml", tree)), f"--{name}", word])
        assert at(as_tree(run), name) == word


def test_texts_in_lists_keep_what_is_written(tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text(f"model: {{path: tiny}}\nendpoints: 12\narguments: [{', '.join(WORDS[:10])}]\n")
    run = parse(ServeRun, ["--config", str(file)])
    assert (run.endpoints, run.arguments) == ("12", WORDS[:10])
    words = ["--config", str(file), "--arguments", "[--max-num-seqs, 512, 8:00]"]
    assert parse(ServeRun, words).arguments == ["--max-num-seqs", "512", "8:00"]
    pipeline = write_yaml(tmp_path / "pipeline.yaml", PIPELINE)
    assert parse(PipelineRun, ["--config", str(pipeline), "--only", "1,2"]).only == ["1", "2"]
    assert parse(PipelineRun, ["--config", str(pipeline), "--from", "7"]).from_ == "7"


@pytest.mark.parametrize(
    ("field", "written", "read"),
    [
        ("modes", "greedy", ["greedy"]),
        ("modes", "sampled, greedy", ["sampled", "greedy"]),
        ("modes", "[greedy]", ["greedy"]),
        ("benchmarks", "svamp,mawps", ["svamp", "mawps"]),
    ],
)
def test_a_list_of_names_needs_no_brackets(tmp_path, field, written, read):
    tree = {"model": {"path": "tiny"}, "data": {"sources": [{"path": "tiny"}]}}
    file = write_yaml(tmp_path / "evaluate.yaml", tree)
    found = getattr(parse(EvaluateRun, ["--config", str(file), f"--{field}", written]), field)
    assert [getattr(entry, "name", entry) for entry in found] == read
    file.write_text(f"{file.read_text()}{field}: {written}\n")
    assert getattr(parse(EvaluateRun, ["--config", str(file)]), field) == found


def test_a_list_of_numbers_needs_no_brackets_and_one_of_texts_does(small_grpo):
    def built(name: str, written: str) -> GRPORun:
        return build(GRPORun, {**merged(small_grpo, name, load(written)), "output_dir": "x"}, "run.yaml")

    assert built("train.pass_rate", "0.2,0.8").train.pass_rate == [0.2, 0.8]
    with pytest.raises(UserError, match=r"`train\.pass_rate\.1`: .* got nothing"):
        built("train.pass_rate", "0.2,")
    with pytest.raises(UserError, match=r"`rewards\.accuracy\.kinds`: Input should be a valid list; got 'math,code'"):
        built("rewards.accuracy.kinds", "math,code")


@pytest.mark.parametrize(
    ("written", "read"),
    [("1e3", 1000), ("1_000", 1000), ("0x10", 16), ("0o17", 15), ("017", 17), ("+5", 5), ('"5"', 5), ("5.0", 5)],
)
def test_numbers_are_read_as_they_are_meant(tmp_path, small_grpo, written, read):
    file = write_yaml(tmp_path / "run.yaml", {k: v for k, v in small_grpo.items() if k != "max_steps"})
    file.write_text(f"{file.read_text()}max_steps: {written}\n")
    assert parse(GRPORun, ["--config", str(file)], processes=1).trl["max_steps"] == read


@pytest.mark.parametrize("written", ["1:30", "true", "2026-09-13", "1,5", "~", "", "[1]", "9" * 5000, ".inf", "ten"])
@pytest.mark.parametrize("field", ["max_steps", "learning_rate", "verify.memory_mib", "rollout.health_timeout"])
def test_what_is_no_number_is_refused(tmp_path, small_grpo, field, written):
    file = write_yaml(tmp_path / "run.yaml", merged(small_grpo, field, "MARKER"))
    file.write_text(file.read_text().replace("MARKER", written))
    with pytest.raises(UserError, match=f"`{field}`"):
        parse(GRPORun, ["--config", str(file)], processes=1)


@pytest.mark.parametrize("word", ["no", "off", "False", "n", "0"])
def test_truth_fields_take_words(tmp_path, small_grpo, word):
    file = write_yaml(tmp_path / "run.yaml", {**small_grpo, "bf16": "MARKER", "resume": "MARKER", "dry_run": "MARKER"})
    file.write_text(file.read_text().replace("MARKER", word))
    run = parse(GRPORun, ["--config", str(file)], processes=1)
    assert (run.trl["bf16"], run.resume, run.dry_run) == (False, False, False)


def test_nothing_unsets_what_may_be_unset_and_empty_sections_have_their_defaults(tmp_path, small_grpo):
    plain = write_yaml(tmp_path / "plain.yaml", small_grpo)
    for nothing in ("", "~", "null"):
        file = tmp_path / "run.yaml"
        file.write_text(f"{plain.read_text()}run_name: {nothing}\nverify: {nothing}\nmin_p: {nothing}\n")
        run = parse(GRPORun, ["--config", str(file), "--verify.workers", "2"], processes=1)
        assert (run.trl["run_name"], run.trl["min_p"], run.verify.workers) == (None, None, 2)
    assert parse(ChatRun, ["--model.path", "tiny", "--prompt", "~ is 5: [x"]).prompt == "~ is 5: [x"
    for field in ("output_dir", "model.path", "data.sources.0.split", "model", "rewards.accuracy"):
        with pytest.raises(UserError, match=f"`{field}"):
            parse(GRPORun, ["--config", str(plain), f"--{field}", "null"], processes=1)


@pytest.mark.parametrize("key", ["output_dir", "max_steps", "model.path", "rollout.engine", "rewards"])
def test_a_flag_without_its_value_is_refused(tmp_path, small_grpo, key):
    file = write_yaml(tmp_path / "run.yaml", small_grpo)
    with pytest.raises(UserError, match=f"--{key} needs a value"):
        parse(GRPORun, ["--config", str(file), f"--{key}", "--bf16", "false"])


def test_a_key_that_stands_twice_is_refused(tmp_path, small_grpo):
    file = write_yaml(tmp_path / "run.yaml", small_grpo)
    lines = file.read_text()
    file.write_text(f"beta: 0\n{lines}beta: 1\n")
    with pytest.raises(UserError, match=r"run\.yaml is not YAML: `beta` stands in lines 1 and \d+; keep one"):
        parse(GRPORun, ["--config", str(file)])
    file.write_text(f"{lines}verify: {{workers: 1, workers: 2}}\n")
    with pytest.raises(UserError, match="`workers` stands in lines"):
        parse(GRPORun, ["--config", str(file)])


def test_anchors_share_values_and_an_override_changes_one_place(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "output_dir: runs/x\ngenerators:\n- {name: 1, model: &m {path: tiny}, data: &d {sources: [{path: tiny}]}}\n"
        "- {name: b, model: *m, data: {<<: *d, template: r1_zero}}\n"
    )
    run = parse(SampleRun, ["--config", str(file), "--generators.0.model.path", "other", "--seed", "3"])
    assert [(g.name, g.model.path, g.data.template) for g in run.generators] == [
        ("1", "other", "chat"), ("b", "tiny", "r1_zero"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not nothing"),
        ("# only a comment", "not nothing"),
        ("just words", "not a text"),
        ("5", "not a text"),
        ("model:\n\tpath: tiny", "is not YAML"),
        ("a: 1\n---\nb: 2", "is not YAML"),
        ("model: tiny", "`model`"),
        ("rollout: vllm\nuse_vllm: true", "`rollout`"),
        ("rollout: {serve: 2}\nvllm_tensor_parallel_size: 2", "`serve`"),
        ("verify: [1]", "`verify`"),
        ("1: 2", "`1` is not a field"),
        ("no: 2", "`no` is not a field"),
        ("max_steps: !!python/object:os.system x", "is not YAML"),
        ("? [a]\n: 1", "is not YAML"),
        ("rewards: &a [*a]", "recursive node"),
    ],
)
def test_what_is_no_configuration_is_refused_in_two_lines(tmp_path, small_grpo, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    rest = ["--data.sources", "[{path: tiny}]", "--output_dir", "x"]
    rest += [] if "model: tiny" in text else ["--model.path", "tiny"]
    with pytest.raises(UserError) as error:
        parse(GRPORun, ["--config", str(file), *rest])
    assert message in str(error.value) and len(str(error.value).splitlines()) <= 2


@pytest.mark.parametrize("home", ["~/x", "$HOME/x", "${HOME}/x"])
@pytest.mark.parametrize(
    ("run_class", "tree", "name"),
    [
        (SFTRun, SFT, "output_dir"),
        (SFTRun, SFT, "model.path"),
        (SFTRun, SFT, "model.tokenizer"),
        (SFTRun, SFT, "data.sources.0.path"),
        (SFTRun, SFT, "deepspeed"),
        (GRPORun, SFT, "rewards.safety.model"),
        (SampleRun, SAMPLE, "output_dir"),
        (SampleRun, SAMPLE, "generators.0.prompting.examples"),
        (SampleRun, {**SAMPLE, "mix": [{}]}, "mix.0.path"),
        (SampleRun, SAMPLE, "rollout.token_file"),
        (SampleRun, SAMPLE, "rollout.weights_folder"),
        (SampleRun, {**SAMPLE, "rollout": {"engine": "vllm"}}, "rollout.servers"),
        (EvaluateRun, {k: v for k, v in SFT.items() if k != "output_dir"}, "output"),
        (ServeRun, {"model": {"path": "tiny"}}, "endpoints"),
        (ServeRun, {"model": {"path": "tiny"}, "endpoints": "x"}, "token_file"),
        (PipelineRun, PIPELINE, "output_dir"),
        (PipelineRun, PIPELINE, "evaluate"),
        (PipelineRun, PIPELINE, "accelerate"),
        (PipelineRun, PIPELINE, "stages.0.model"),
        (PipelineRun, PIPELINE, "stages.0.config"),
        (PipelineRun, PIPELINE, "stages.0.sbatch.output"),
        (PipelineRun, PIPELINE, "sbatch.chdir"),
    ],
)
def test_paths_are_expanded(tmp_path, monkeypatch, run_class, tree, name, home):
    monkeypatch.setenv("HOME", "/somewhere")
    file = write_yaml(tmp_path / "run.yaml", merged(tree, name, home))
    plain = write_yaml(tmp_path / "plain.yaml", merged(tree, name, "other"))
    for words in (["--config", str(file)], ["--config", str(plain), f"--{name}={home}"]):
        run = parse(run_class, words)
        if run_class is GRPORun:
            check_rewards(run)
        assert at(as_tree(run), name) == "/somewhere/x"


def test_more_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_yaml(tmp_path / "run.yaml", SFT)
    assert parse(SFTRun, ["--config", "~/run.yaml"]).model.path == "tiny"
    assert parse(SFTRun, ["--config=$HOME/run.yaml"]).model.path == "tiny"
    with pytest.raises(UserError, match="--config: the environment has no variable"):
        parse(SFTRun, ["--config", "$R1DIST_UNSET/run.yaml"])
    servers = {**SAMPLE, "rollout": {"engine": "vllm", "servers": "~/a.json, $HOME/b.json"}}
    assert build(SampleRun, servers, "x").rollout.servers == f"{tmp_path}/a.json,{tmp_path}/b.json"
    requests = {"sources": [{"path": "tiny_unsafe"}], "safety": "~/s", "helpfulness": "~/h"}
    run = build(EvaluateRun, {"model": {"path": "tiny"}, "data": SFT["data"], "requests": requests}, "x")
    assert (run.requests.safety, run.requests.helpfulness) == (f"{tmp_path}/s", f"{tmp_path}/h")
    arguments = {"model": {"path": "tiny"}, "endpoints": "e", "arguments": ["--download-dir", "~/m", "5$"]}
    assert build(ServeRun, arguments, "x").arguments == ["--download-dir", f"{tmp_path}/m", "5$"]
    problem = {**SFT, "data": {"sources": [{"path": "tiny", "problem": "~a $HOME"}]}}
    assert build(SFTRun, problem, "x").data.sources[0].problem == "~a $HOME"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("$R1DIST_UNSET/x", "the environment has no variable $R1DIST_UNSET"),
        ("a/${R1DIST_UNSET}", "the environment has no variable ${R1DIST_UNSET}"),
        ("~nobody_of_that_name/x", "there is no home folder ~nobody_of_that_name"),
        ("", "it is empty"),
    ],
)
def test_a_path_that_cannot_be_is_refused(value, message):
    for name in ("output_dir", "model.path", "data.sources.0.path"):
        with pytest.raises(UserError) as error:
            build(SFTRun, merged(SFT, name, value), "run.yaml")
        assert str(error.value) == f"run.yaml: `{name}`: {message}; got {value!r} (str)."

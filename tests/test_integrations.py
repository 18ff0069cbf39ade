"""Lightning's and Hugging Face's trainers prune as a loop by hand does, and go on from their own checkpoints."""

import json
import warnings
from importlib import import_module
from pathlib import Path

import pytest
import torch

warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch.jit")
REASON = "not installed: pip install -c constraints.txt -e '.[integrations]'"
pl = pytest.importorskip("pytorch_lightning", reason=REASON)
pytest.importorskip("accelerate", reason=REASON)
pytest.importorskip("transformers", reason=REASON)
import digits  # noqa: E402  (these need the packages)
import handwritten  # noqa: E402
import huggingface_trainer  # noqa: E402
import lightning_callback  # noqa: E402

from taylorkern.integrations import huggingface, lightning  # noqa: E402
from taylorkern.integrations.training import Training  # noqa: E402

HALVES = pytest.mark.parametrize("accumulate, half", [(1, False), (2, False), (3, True)])


def places(rounds):
    return [[unit.places for unit in units] for units in rounds]


def same_bits(model, other):
    state, theirs = model.state_dict(), other.state_dict()
    return state.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in state.items())


def callback_of(trainer):
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, huggingface.PruningCallback))


@HALVES
def test_lightning_removes_what_a_loop_by_hand_removes(accumulate, half):
    model, removed = handwritten.train(accumulate=accumulate, half=half)
    precision = "bf16-mixed" if half else "32-true"
    theirs, pruning = lightning_callback.train(accumulate_grad_batches=accumulate, precision=precision)
    assert len(removed) > 2 and places(pruning.removed) == places(removed)
    assert same_bits(model, theirs.network)


@HALVES
def test_hugging_face_removes_what_a_loop_by_hand_removes(accumulate, half, tmp_path):
    model, removed = handwritten.train(accumulate=accumulate, half=half)
    trainer = huggingface_trainer.trainer(str(tmp_path), gradient_accumulation_steps=accumulate, bf16=half)
    trainer.train()
    assert len(removed) > 2 and places(callback_of(trainer).removed) == places(removed)
    assert same_bits(model, trainer.model)


def test_the_loop_by_hand_goes_on_to_the_same_bits(tmp_path):
    whole, removed = handwritten.train()
    _, before = handwritten.train(str(tmp_path), epochs=1)
    again, after = handwritten.train(str(tmp_path))
    assert places(before + after) == places(removed) and before
    assert same_bits(whole, again)


class Manual(lightning_callback.Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx) / 2)
        if batch_idx % 2:
            self.clip_gradients(optimizer, 1.0, "norm")
            optimizer.step()
            optimizer.zero_grad()


def fitted(model, callback, folder, ckpt_path=None, batches=None, **settings):
    given = {"max_epochs": 2, "accelerator": "cpu", "default_root_dir": folder, "logger": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    callbacks = [callback, *settings.pop("callbacks", [])]
    trainer = pl.Trainer(callbacks=callbacks, **(given | quiet | settings))
    trainer.fit(model, batches or digits.minibatches(), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


def pruning(**arguments):
    return lightning.PruningCallback(
        **({"example_inputs": digits.example(), "module": "network"} | digits.PRUNING | arguments)
    )


def test_lightning_steps_with_manual_optimisation(tmp_path):
    _, removed = handwritten.train(accumulate=2)
    callback = pruning()
    fitted(Manual(), callback, tmp_path)
    assert places(callback.removed) == places(removed)


@pytest.mark.parametrize("mode", ["cut", "mask"])
@pytest.mark.parametrize("epoch", [0, 1])
def test_lightning_resumes_to_the_same_bits(mode, epoch, tmp_path):
    """Epochs of 6 steps: the first ends within the second round, the second with the third; both after cuts."""
    settings = {"limit_train_batches": 6, "max_epochs": 5, "gradient_clip_val": 1.0}
    keep = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    whole, callback = lightning_callback.Classifier(), pruning(mode=mode)
    fitted(whole, callback, tmp_path, callbacks=[keep], enable_checkpointing=True, **settings)
    again, resumed = lightning_callback.Classifier(), pruning(mode=mode, example_inputs=None)
    trainer = fitted(again, resumed, tmp_path, tmp_path / f"epoch={epoch}.ckpt", **settings)
    assert trainer.global_step == 30 and resumed.removed
    assert places(resumed.removed) == places(callback.removed[-len(resumed.removed) :])
    assert same_bits(whole, again)


def test_lightning_goes_on_from_a_checkpoint_without_pruning(tmp_path):
    keep = pl.callbacks.ModelCheckpoint(tmp_path, "dense")
    fitted(lightning_callback.Classifier(), keep, tmp_path, max_epochs=1, enable_checkpointing=True)
    model, callback = lightning_callback.Classifier(), pruning()
    fitted(model, callback, tmp_path, tmp_path / "dense.ckpt")
    assert callback.removed and model.network.conv1.out_channels < 12


def test_lightning_takes_an_example_from_the_first_batch(tmp_path):
    class Pairs(lightning_callback.Classifier):
        def forward(self, images):
            return self.network(images)["logits"]

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    pairs = [(sample["images"], sample["labels"]) for sample in digits.samples()]
    model, callback = Pairs(), lightning.PruningCallback(**digits.PRUNING, stop=True)
    batches = torch.utils.data.DataLoader(pairs, digits.BATCH)
    trainer = fitted(model, callback, tmp_path, batches=batches, max_epochs=9)
    assert callback.pruner.done and trainer.current_epoch < 9
    assert trainer.callback_metrics["pruning/kept"] == pytest.approx(callback.pruner.kept)
    assert trainer.callback_metrics["pruning/units"] == 44 - sum(map(len, callback.removed))


def test_what_lightning_masked_is_cut_when_fitting_ends(tmp_path):
    model, callback = lightning_callback.Classifier(), pruning(mode="mask")
    fitted(model, callback, tmp_path)
    assert callback.removed and model.network.conv1.out_channels < 12


@pytest.mark.parametrize("averaging", ["StochasticWeightAveraging", "EMAWeightAveraging"])
def test_averaged_weights_need_a_mask_in_lightning(averaging, tmp_path):
    if not hasattr(pl.callbacks, averaging):
        pytest.skip(f"this Lightning has no {averaging}")

    class Own(getattr(pl.callbacks, averaging)):
        pass

    arguments = {"swa_lrs": 0.01, "swa_epoch_start": 1} if averaging.startswith("Stochastic") else {}
    with pytest.raises(ValueError, match=r"^Own keeps an average .* mode='mask'"):
        fitted(lightning_callback.Classifier(), pruning(), tmp_path, callbacks=[Own(**arguments)])
    model, callback = lightning_callback.Classifier(), pruning(mode="mask")
    fitted(model, callback, tmp_path, callbacks=[Own(**arguments)])
    assert callback.removed and model.network.conv1.out_channels < 12


def test_several_processes_need_a_mask():
    with pytest.raises(ValueError, match="give mode='mask'"):
        Training(digits.example(), {}).refuse(2)
    Training(digits.example(), {"mode": "mask"}).refuse(2)


def test_a_callback_prunes_one_fit(tmp_path):
    model, callback = lightning_callback.Classifier(), pruning()
    fitted(model, callback, tmp_path)
    with pytest.raises(RuntimeError, match="pruned a training already"):
        fitted(model, callback, tmp_path)


def resumable(folder, mode="cut"):
    callback = huggingface.PruningCallback(digits.example(), **digits.PRUNING, mode=mode)
    return huggingface_trainer.trainer(str(folder), callback, save_strategy="steps", save_steps=9)


@pytest.mark.parametrize("mode", ["cut", "mask"])
def test_hugging_face_resumes_to_the_same_bits(mode, tmp_path):
    whole = resumable(tmp_path / "whole", mode)
    whole.train()
    again = resumable(tmp_path / "again", mode)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-9"))
    resumed, all_of_them = (places(callback_of(trainer).removed) for trainer in (again, whole))
    assert resumed and resumed == all_of_them[-len(resumed) :] and len(resumed) < len(all_of_them)
    assert same_bits(whole.model, again.model)
    moments, theirs = (
        [state["momentum_buffer"] for state in trainer.optimizer.state_dict()["state"].values()]
        for trainer in (again, whole)
    )
    assert all(map(torch.equal, moments, theirs))
    histories = [[entry for entry in t.state.log_history if "pruning/kept" in entry] for t in (again, whole)]
    assert histories[0] == histories[1]


def test_a_pruned_checkpoint_of_hugging_face_without_its_pruner_is_refused(tmp_path):
    resumable(tmp_path).train()
    path = tmp_path / "checkpoint-18" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["PruningCallback"]
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="holds no pruner's state"):
        resumable(tmp_path).train(resume_from_checkpoint=str(path.parent))


def test_a_model_whose_pruned_weights_wait_does_not_run(tmp_path):
    trained, fresh = resumable(tmp_path), resumable(tmp_path)
    trained.train()
    dense = {name: tensor.clone() for name, tensor in fresh.model.state_dict().items()}
    fresh.model.load_state_dict(trained.model.state_dict())
    assert all(torch.equal(tensor, dense[name]) for name, tensor in fresh.model.state_dict().items())
    with pytest.raises(RuntimeError, match=r"wait for trainer\.train"):
        fresh.model(**digits.example())


def test_hugging_face_goes_on_from_a_checkpoint_without_pruning(tmp_path):
    dense = huggingface_trainer.trainer(str(tmp_path), save_strategy="steps", save_steps=9)
    dense.remove_callback(huggingface.PruningCallback)
    dense.train()
    trainer = resumable(tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert callback_of(trainer).removed and Path(tmp_path / "checkpoint-18").exists()


def test_hugging_faces_settings_that_do_not_go_with_pruning_are_refused(tmp_path):
    with pytest.raises(ValueError, match="would make the callback anew"):
        huggingface_trainer.trainer(str(tmp_path), restore_callback_states_from_checkpoint=True)


def test_a_callback_that_is_added_later_refuses_the_same_when_training_begins(tmp_path):
    trainer = huggingface_trainer.trainer(str(tmp_path))
    pruning = callback_of(trainer)
    trainer.remove_callback(pruning)
    trainer.args.load_best_model_at_end = True
    trainer.add_callback(pruning)
    with pytest.raises(ValueError, match="load_best_model_at_end: the best model"):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert pruning.pruner is None


def test_a_callback_that_is_added_later_does_not_resume(tmp_path):
    """Masked weights have the shapes of the dense ones, so that the Trainer loads them; cut ones it refuses itself."""
    resumable(tmp_path, "mask").train()
    trainer = resumable(tmp_path, "mask")
    callback_of(trainer)._waiting.leave()
    trainer.remove_callback(callback_of(trainer))
    late = huggingface.PruningCallback(digits.example(), **digits.PRUNING, mode="mask")
    trainer.add_callback(late)
    with pytest.raises(ValueError, match="give it to the Trainer from the start"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert late.pruner is None


def test_a_model_that_takes_tokens_is_pruned_by_hugging_faces_trainer(tmp_path):
    transformers = import_module("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.BertConfig(**sizes, intermediate_size=24, max_position_embeddings=8, num_labels=3)
    model = transformers.BertForSequenceClassification(config)
    tokens = [{"input_ids": torch.randint(20, (8,)), "labels": torch.tensor(i % 3)} for i in range(32)]
    callback = huggingface.PruningCallback(
        {"input_ids": tokens[0]["input_ids"][None]}, target=0.8, of="params", every=2, step=6, stop=True
    )
    arguments = transformers.TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", num_train_epochs=9
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=tokens, callbacks=[callback])
    trainer.train()
    assert callback.pruner.done and trainer.state.epoch < 9
    assert model(**{"input_ids": tokens[0]["input_ids"][None]}).logits.shape == (1, 3)


def test_arguments_that_are_the_trainers_are_refused():
    with pytest.raises(ValueError, match="optimizer: these are the trainer's"):
        lightning.PruningCallback(optimizer=None)

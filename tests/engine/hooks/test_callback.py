from detkit.engine import TrainerBase, hooks


class Trainer(TrainerBase):
    def run_step(self):
        self.after_backward()


def test_functions_are_called_with_the_trainer():
    seen, trainer = [], Trainer()
    events = ["before_train", "before_step", "after_backward", "after_step", "after_train"]
    trainer.register_hooks(
        [hooks.CallbackHook(**{e: lambda t, e=e: seen.append((e, t.iter)) for e in events})]
    )
    trainer.train(0, 1)
    assert seen == [(e, 1 if e == "after_train" else 0) for e in events]


def test_functions_are_optional():
    trainer = Trainer()
    trainer.register_hooks([hooks.CallbackHook()])
    trainer.train(0, 2)
    assert trainer.iter == 2

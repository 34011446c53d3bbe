# SPDX-License-Identifier: Apache-2.0
"""Unlearning with two GANs (2407.18467) of an image model.

One GAN learns the forget set, the other the retain set. The original model labels the
images that they draw; labels of forget images are replaced by wrong ones; the model is
finetuned on the mixture of real and drawn images.
"""

import time

import numpy as np

from experiments.vision.world import Case, Result, unlearn
from jaxunlearn import recipes, synth
from jaxunlearn.data import table
from jaxunlearn.models import gan

RULE = "random_wrong"  # how labels of forget images are replaced
LATENT = 64
NUM_PICTURES = 50  # drawn images of each set that are shown


def multi_gan(case: Case) -> Result:
    """Finetunes on real and drawn images, forget labels replaced."""
    config, start = case.world.config, time.process_time()
    model, shape = case.world.model, case.world.model.config.shape
    net = gan.make(gan.GanConfig(shape, latent=LATENT, width=16, ups=2, norm=False))
    streams = {"forget": case.split.forget, "retain": case.split.retain}
    pairs, log = synth.fit_gans(
        net,
        streams,
        key=case.key,
        steps=config.gan_steps,
        batch_size=config.gan_batch,
        loss="relativistic",
        r1=1.0,
        learning_rate=5e-4,
    )
    counts = {
        "forget": table.num_rows(case.split.forget),
        "retain": max(1, table.num_rows(case.split.retain) // 10),
    }
    drawn = {}
    for name, pair in pairs.items():
        images = synth.draw_images(
            net.generate, pair["generator"], counts[name], latent=LATENT, key=case.key
        )
        drawn[name], _ = synth.pseudo_label(model, case.params, images)
    case.shared["drawn"] = {k: v["image"][:NUM_PICTURES] for k, v in drawn.items()}
    mixture = synth.build_mixture(
        forget=case.split.forget,
        retain=case.split.retain,
        drawn_forget=drawn["forget"],
        drawn_retain=drawn["retain"],
        num_classes=10,
        rule=RULE,
        key=case.key,
    )
    offline = time.process_time() - start
    real = config.gan_steps * config.gan_batch  # real images of each set that were seen
    about = {
        "rule": RULE,
        "discriminator_accuracy": float(
            np.mean([entry["forget/discriminator/right"] for entry in log[-50:]])
        ),
        "gan_epochs": {k: real / table.num_rows(v) for k, v in streams.items()},
    }
    return _finetune(case, mixture)._replace(offline=offline, about=about)


def without_images(case: Case) -> Result:
    """The same finetuning without any drawn image."""
    mixture = synth.build_mixture(
        forget=case.split.forget,
        retain=case.split.retain,
        num_classes=10,
        rule=RULE,
        key=case.key,
    )
    return _finetune(case, mixture)


def _finetune(case: Case, mixture: table.Table) -> Result:
    recipe = recipes.finetune.nll(
        case.world.model, learning_rate=1e-3, streams={"mixed": 1.0}
    )
    return unlearn(case, recipe, {"mixed": mixture})

# SPDX-License-Identifier: Apache-2.0
"""Papers as compositions: terms, optimizer chain and trainable pattern, with the
defaults of the paper or its code.

    recipe = recipes.blur.npo(model, gamma=0.1)
    recipe = recipes.by_name("blur.npo")(model, gamma=0.1)
"""

from jaxunlearn.recipes import blur as blur
from jaxunlearn.recipes import condensation as condensation
from jaxunlearn.recipes import finetune as finetune
from jaxunlearn.recipes import mrp as mrp
from jaxunlearn.recipes import openunlearning as openunlearning
from jaxunlearn.recipes import rmu as rmu
from jaxunlearn.recipes import sure as sure
from jaxunlearn.recipes import surgery as surgery
from jaxunlearn.recipes._names import by_name as by_name
from jaxunlearn.recipes._recipe import Recipe as Recipe
from jaxunlearn.recipes._recipe import Setup as Setup

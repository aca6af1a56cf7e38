"The toy task as the tests use it: few examples, completions with unequal numbers of tokens."

from steer_nb.testing.toy_task import toy_model, toy_task, toy_tokenizer

tokenizer = toy_tokenizer()
toy = toy_task(29, 9, 1, metric="generate")
tiny = toy_model

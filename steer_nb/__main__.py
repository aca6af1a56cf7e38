"`python -m steer_nb`: the program, as `accelerate launch -m` and `torchrun -m` start it."
from steer_nb.cli.cli import main

if __name__ == "__main__":
    main()

"`python -m steer_nb`: the program, as `accelerate launch -m steer_nb` and `torchrun -m steer_nb` start it."
from steer_nb.cli.cli import main

if __name__ == "__main__":
    main()

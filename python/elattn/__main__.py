from elattn.cli import main

main()

from starkv_cli.main import main

main()

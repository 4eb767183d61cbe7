from gptworks.cli import main

main()

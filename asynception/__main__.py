from asynception.cli import main

main()

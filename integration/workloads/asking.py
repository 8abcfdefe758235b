"""For clients in Python: the same words as in lib.sh, and some that several clients share."""

import http.client
import os
import sys
import threading

ADDRESS = os.environ["ADDRESS"]
WORK = os.environ.get("WORK", "")


def stopped():
    return os.path.exists(WORK + "/stop")


def answered():
    with open(WORK + "/answers", "ab") as answers:
        answers.write(b".")


def expect(wanted, found):
    if wanted != found:
        short = [text if len(text) < 200 else text[:200] + "…" for text in (repr(wanted), repr(found))]
        raise SystemExit("expected {}, found {}".format(*short))


def together(count, work):
    """Calls `work(number, going)` in that many threads at once, each for as long as `going()`."""
    wrong = []

    def one(number):
        try:
            work(number, lambda: not stopped() and not wrong)
        except BaseException as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    if wrong:
        sys.exit(wrong[0])


class Web:
    """A kept-alive connection to a web server: it must stay the same one."""

    def __init__(self, port=80):
        self.one = http.client.HTTPConnection(ADDRESS, port, timeout=50)
        self.one.connect()
        self.name = self.one.sock.getsockname()

    def ask(self, method, path, body=None, headers={}):
        self.one.request(method, path, body, headers)
        answer = self.one.getresponse()
        content = answer.read()
        expect((200, self.name), (answer.status, self.one.sock and self.one.sock.getsockname()))
        return content


def over_the_web(many, ask, port=80):
    """Has that many kept-alive connections at once ask `ask(web, number, count)` over and over, which fails at a wrong
    answer. `count` counts from 1."""

    def work(number, going):
        web, count = Web(port), 0
        while going():
            count += 1
            ask(web, number, count)
            answered()

    together(many, work)

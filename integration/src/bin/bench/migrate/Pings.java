import java.io.*;
import java.net.*;
import java.util.Arrays;

/** A heap of 2 GiB that is written without pause, and lines that are sent back. */
public class Pings {
    static final int PAGE = 16384;
    /** Of what lives, each part is made anew in turn: 1 GiB in some ten seconds. */
    static final byte[][] live = new byte[(1 << 30) / PAGE][];
    static final int EACH_MILLISECOND = 7;

    static byte[] page(int at) {
        byte[] page = new byte[PAGE];
        Arrays.fill(page, (byte) (at % 251));
        return page;
    }

    static void daemon(Runnable work) {
        Thread thread = new Thread(work);
        thread.setDaemon(true);
        thread.start();
    }

    static void allocate() {
        for (int at = 0; ; at = (at + 1) % live.length) {
            if (live[at][at % PAGE] != (byte) (at % 251)) {
                System.out.println("FAIL page " + at);
                System.exit(1);
            }
            live[at] = page(at);
            if (at % EACH_MILLISECOND == 0)
                try { Thread.sleep(1); } catch (InterruptedException e) { return; }
        }
    }

    static void answer(Socket client) {
        try (client) {
            client.setTcpNoDelay(true);
            byte[] some = new byte[4096];
            InputStream in = client.getInputStream();
            OutputStream out = client.getOutputStream();
            for (int count; (count = in.read(some)) > 0; ) out.write(some, 0, count);
        } catch (IOException gone) { }
    }

    public static void main(String[] args) throws IOException {
        for (int at = 0; at < live.length; at++) live[at] = page(at);
        daemon(Pings::allocate);
        ServerSocket server = new ServerSocket(7000);
        while (true) {
            Socket client = server.accept();
            daemon(() -> answer(client));
        }
    }
}

package main

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"testing"
	"time"
)

// pause is longer than TCP_USER_TIMEOUT.
const pause = userTimeout + 5*time.Second

// A command that does not read its input for a while, and a client that does not read the
// command's output, as with a pager, are waited for: both directions stand still, one after
// the other, with more on its way than the kernel holds.
func TestPause(t *testing.T) {
	t.Parallel()
	r := startProgram(t)
	c, err := r.tryConnect("http/1.1")
	if err != nil {
		t.Fatal(err)
	}
	defer c.hangUp()
	c.TLS.SetDeadline(time.Now().Add(2*pause + 3*patience))
	fmt.Fprintf(c.TLS, "GET %s?command=cat HTTP/1.1\r\nHost: kubernetes\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", execPath)
	from := bufio.NewReader(c.TLS)
	if res, err := http.ReadResponse(from, nil); err != nil || res.StatusCode != http.StatusSwitchingProtocols {
		t.Fatal(res, err)
	}
	data := make([]byte, 48<<20)
	rand.NewChaCha8([32]byte{}).Read(data)
	wrote := make(chan error, 1)
	go func() {
		_, err := c.TLS.Write(data)
		c.TLS.CloseWrite()
		wrote <- err
	}()
	time.Sleep(2 * pause)
	select {
	case err := <-wrote:
		t.Fatalf("all of it is on its way, so that nothing stands still (error %v)", err)
	default:
	}
	got, err := io.ReadAll(from)
	if err != nil {
		t.Error(err)
	}
	if err := <-wrote; err != nil {
		t.Error(err)
	}
	if a, b := sha256.Sum256(got), sha256.Sum256(data); !bytes.Equal(a[:], b[:]) {
		t.Errorf("%d bytes came back, or others than the %d that were sent", len(got), len(data))
	}
}

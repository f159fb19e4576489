package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

const (
	// startWithin bounds how long a proxy may take to its first answer.
	startWithin = 15 * time.Second
	// stopWithin bounds how long a proxy may take to end after SIGTERM.
	stopWithin = 5 * time.Second
)

// running is a started peer. Without a proxy it is the first backend.
type running struct {
	address string
	cmd     *exec.Cmd     // nil: no proxy
	ended   chan struct{} // closed when the process has ended
}

// start starts the peer and waits for an answer of a backend through it.
func (p peer) start(ctx context.Context, l *lab) (*running, error) {
	if p.program == "" {
		return &running{address: l.backends[0]}, nil
	}
	listen, err := freeAddress()
	if err != nil {
		return nil, err
	}
	admin, err := freeAddress()
	if err != nil {
		return nil, err
	}
	var config bytes.Buffer
	if err := p.config.Execute(&config, l.settings(listen, admin)); err != nil {
		return nil, err
	}
	configFile := filepath.Join(l.dir, p.name+".conf")
	if err := os.WriteFile(configFile, config.Bytes(), 0o600); err != nil {
		return nil, err
	}
	logFile, err := os.Create(filepath.Join(l.dir, p.name+".log"))
	if err != nil {
		return nil, err
	}
	defer logFile.Close()

	cmd := exec.CommandContext(ctx, p.program, p.args(configFile)...)
	cmd.Stdout, cmd.Stderr = logFile, logFile
	// GOMAXPROCS: as many threads as the configuration files of others say. The
	// rest keeps Caddy from writing into the user's home.
	cmd.Env = append(os.Environ(), fmt.Sprintf("GOMAXPROCS=%d", l.threads), "XDG_DATA_HOME="+l.dir, "XDG_CONFIG_HOME="+l.dir)
	// Also when this program is killed: main keeps its thread for that. SIGTERM,
	// since nginx would leave its workers behind after SIGKILL.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = stopWithin
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("%s: %w", p.name, err)
	}
	r := &running{address: listen, cmd: cmd, ended: make(chan struct{})}
	go func() {
		_ = cmd.Wait()
		close(r.ended)
	}()
	if err := r.awaitReady(ctx, l.client); err != nil {
		r.stop()
		output, _ := os.ReadFile(logFile.Name())
		return nil, fmt.Errorf("%s: %w; its output:\n%s", p.name, err, output)
	}
	return r, nil
}

// awaitReady asks for the small object until a backend gives it.
func (r *running) awaitReady(ctx context.Context, client *http.Client) error {
	ctx, cancel := context.WithTimeout(ctx, startWithin)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ask(ctx, client, "https://"+r.address+smallPath)
		if err == nil {
			return nil
		}
		select {
		case <-r.ended:
			return errors.New("it ended at once")
		case <-ctx.Done():
			return fmt.Errorf("no answer within %v: %w", startWithin, err)
		case <-tick.C:
		}
	}
}

// ask makes one request that has to be answered with 200.
func ask(ctx context.Context, client *http.Client, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", resp.Status, body)
	}
	return nil
}

// usage is what the proxy has used so far; nothing without a proxy.
func (r *running) usage() (usage, error) {
	if r.cmd == nil {
		return usage{}, nil
	}
	return usageOf(r.cmd.Process.Pid)
}

// stop ends the process, first kindly.
func (r *running) stop() {
	if r.cmd == nil {
		return
	}
	_ = r.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-r.ended:
	case <-time.After(stopWithin):
		_ = r.cmd.Process.Kill()
		<-r.ended
	}
}

// freeAddress returns an address of the loopback interface that nobody
// listens on.
func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

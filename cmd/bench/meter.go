package main

import (
	"errors"
	"time"
)

// meter reads what a proxy has used at the begin and at the end of what is
// measured.
type meter struct {
	read          func() (usage, error)
	before, after usage
	started       time.Time
	took          time.Duration
	err           error
}

var errNotBegun = errors.New("the measurement has not begun")

func newMeter(read func() (usage, error)) *meter {
	return &meter{read: read, err: errNotBegun}
}

func (m *meter) begin() {
	m.started = time.Now()
	m.before, m.err = m.read()
}

func (m *meter) end() {
	m.took = time.Since(m.started)
	if m.err == nil {
		m.after, m.err = m.read()
	}
}

// sample is what n requests, events or connections have cost.
func (m *meter) sample(n int) (sample, error) {
	switch {
	case m.err != nil:
		return sample{}, m.err
	case m.took <= 0:
		return sample{}, errors.New("the measurement has not ended")
	case n <= 0:
		return sample{}, errors.New("there was nothing to measure")
	}
	return sample{
		cpu:     (m.after.cpu - m.before.cpu) / time.Duration(n),
		rate:    float64(n) / m.took.Seconds(),
		rss:     m.after.rss - m.before.rss,
		peakRSS: m.after.peakRSS,
	}, nil
}
